"""Eigenvalues of a few blocks: those of the matrix that is solved with."""

import numpy as np
import pytest
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection import spectra as module
from cap_hf.collection.spectra import spectra, spread


def collected(**config) -> CAPCompressor:
    model = build("ViT")
    return CAPCompressor(model, CAPConfig(num_grads=8, **config)).collect(random_batches(model, 8))


def test_a_few_values_are_spread_from_the_first_to_the_last():
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(list(range(11)), 3) == [0, 5, 10]
    assert spread([1, 2, 3], 1) == [1]


def test_eigenvalues_are_those_of_gradients_and_of_what_is_solved_with():
    compressor = collected(fisher_block_size=16)
    found = spectra(compressor.paths, 3)
    names = [target.name for target in compressor.targets]
    assert [each["name"] for each in found] == spread(names, 3)
    for each in found:
        target = next(target for target in compressor.targets if target.name == each["name"])
        fisher = compressor.fisher
        gradients = fisher.sums[target.name].full(slice(0, 1))[0].numpy() / fisher.count
        mixed = fisher.damped(target, slice(0, 1), 0.0)[0].numpy()
        for kind, matrix in (("gradients", gradients), ("with prior", mixed)):
            whole = np.sort(np.linalg.eigvalsh(matrix))[::-1]
            ranks = each["kinds"][kind]["ranks"]
            assert (ranks[0], ranks[-1]) == (1, 16)
            expected = [max(whole[rank - 1], 0) for rank in ranks]
            assert each["kinds"][kind]["values"] == pytest.approx(expected, rel=1e-3, abs=1e-9 * whole[0])
        # 8 gradients span 8 dimensions; the prior fills the others.
        beyond = [value for rank, value in zip(ranks, each["kinds"]["gradients"]["values"], strict=True) if rank > 8]
        assert max(beyond) < 1e-6 * each["kinds"]["gradients"]["values"][0]
        assert (each["samples"], each["size"], each["weights"]) == (8, 16, 16)
        assert each["damp"] == fisher.damps[target.name]


def test_of_a_large_block_the_first_weights_are_looked_at(monkeypatch):
    monkeypatch.setattr(module, "MOST_WEIGHTS", 4)
    compressor = collected(fisher_block_size=16, fisher_prior="identity")
    (each,) = spectra(compressor.paths, 1)
    matrix = compressor.fisher.sums[each["name"]].full(slice(0, 1))[0][:4, :4].numpy() / 8
    assert list(each["kinds"]) == ["gradients"]
    assert each["weights"] == 4
    expected = np.sort(np.linalg.eigvalsh(matrix))[::-1]
    assert each["kinds"]["gradients"]["values"] == pytest.approx(expected.clip(0), rel=1e-3, abs=1e-9 * expected[0])


def test_without_sums_there_is_nothing():
    assert spectra(collected(method="magnitude").paths) == []
