"""The registry of methods, and the steps in which they differ."""

import pytest
import torch
from support.quadratics import inverse_of

from cap_hf.config import METHODS as NAMES
from cap_hf.config import CAPConfig
from cap_hf.method.baselines import rank_scores, saliencies
from cap_hf.method.elimination import eliminate
from cap_hf.method.methods import METHODS
from cap_hf.method.panels import Elimination
from cap_hf.method.reconstruction import independent_update, reconstruct_each
from cap_hf.patterns import NMPattern


def test_the_registry_has_what_a_config_may_name():
    assert tuple(METHODS) == NAMES
    assert all(METHODS[name].name == name for name in NAMES)
    assert {METHODS[name].statistic for name in NAMES} == {"gradients", "inputs", None}


def test_the_damp_is_the_config_s_or_the_method_s():
    for name, damp in {"cap": 5e-4, "obs": 5e-4, "sparsegpt": 1e-2, "wanda": 0.0}.items():
        assert METHODS[name].damp(CAPConfig(method=name)) == damp
        assert METHODS[name].damp(CAPConfig(method=name, damp=0.5)) == 0.5


def test_a_refit_is_the_config_s_or_the_method_s():
    for name, method in METHODS.items():
        assert method.refits(CAPConfig(method=name)) == (name == "cap")
        assert method.refits(CAPConfig(method=name, refit=True))
        assert not method.refits(CAPConfig(method=name, refit=False))


def test_methods_of_inputs_know_rows_alone():
    for name in ("sparsegpt", "wanda"):
        assert METHODS[name].block_size(CAPConfig(method=name, fisher_block_size=8)) == "row"
    assert METHODS["cap"].block_size(CAPConfig(fisher_block_size=8)) == 8


def test_methods_of_gradients_alone_have_a_prior():
    assert {name for name, method in METHODS.items() if method.has_prior(CAPConfig())} == {"cap", "obs"}
    for changes in ({"fisher_prior": "identity"}, {"prior_strength": 0}):
        assert not any(method.has_prior(CAPConfig(**changes)) for method in METHODS.values())


@pytest.fixture
def problem():
    """Weights, some 0, and a damped Fisher."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    weights[:, 2] = 0
    samples = torch.randn(3, 16, 8, dtype=torch.float64, generator=generator)
    return weights, samples.mT @ samples / 16 + 1e-3 * torch.eye(8, dtype=torch.float64)


@pytest.mark.parametrize("pattern", [None, NMPattern(2, 4)])
def test_each_method_has_its_own_order(problem, pattern):
    weights, fisher = problem
    alone = fisher.clone()
    alone[:, 2, :] = alone[:, :, 2] = 0
    alone[:, 2, 2] = 1
    inverse = inverse_of(alone)
    by_norm = (weights.abs() * fisher.diagonal(dim1=1, dim2=2).sqrt()).masked_fill(weights == 0, -1)
    ranked = rank_scores(by_norm, pattern).order
    expected = {
        "cap": eliminate(weights, inverse, pattern),
        "sparsegpt": eliminate(weights, inverse, pattern),
        "obs": rank_scores(saliencies(weights, inverse), pattern),
        "wanda": Elimination(ranked, (torch.arange(ranked.shape[1]).double() + 1).div(8).expand(ranked.shape)),
        "magnitude": rank_scores(weights.square(), pattern),
    }
    for name, method in METHODS.items():
        found = method.eliminate(weights, None if name == "magnitude" else fisher.clone(), pattern)
        assert torch.equal(found.order, expected[name].order), name
        # CAP eliminates in float32 where that is accurate.
        torch.testing.assert_close(found.losses, expected[name].losses, rtol=1e-5, atol=1e-9)


def test_what_is_kept_moves_as_the_config_says(problem):
    """Each time as it does alone; a weight that is 0 survives none."""
    weights, fisher = problem
    turns = (torch.arange(8) * 3 % 8).expand(len(weights), -1).masked_fill(weights == 0, -1)
    counts = torch.tensor([0, 2, 6])[:, None].expand(3, len(weights))
    keep = turns >= counts[..., None]
    for name, method in METHODS.items():
        for update in ("joint", "independent", "none"):
            given = None if name == "magnitude" else fisher.clone()
            found = method.reconstruct(weights, given, turns, counts, update)
            assert (found[~keep] == 0).all()
            moved = not torch.equal(found[1:][keep[1:]], weights.expand(3, -1, -1)[1:][keep[1:]])
            assert moved == (name not in ("wanda", "magnitude") and update != "none"), (name, update)
            for time in range(3):
                alone = method.reconstruct(weights, given, turns, counts[time : time + 1], update)
                torch.testing.assert_close(found[time], alone[0])
    joint = METHODS["cap"].reconstruct(weights, fisher, turns, counts, "joint")
    assert torch.equal(joint, reconstruct_each(weights, fisher, turns, counts))
    alone = fisher.clone()
    alone[:, 2, :] = alone[:, :, 2] = 0
    alone[:, 2, 2] = 1
    single = METHODS["cap"].reconstruct(weights, fisher, turns, counts, "independent")
    torch.testing.assert_close(single[1], independent_update(weights, inverse_of(alone), keep[1]))
