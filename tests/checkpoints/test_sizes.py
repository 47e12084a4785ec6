"""Bytes by the format's rules against the bytes of what is really packed and written."""

import pytest
import torch
from support.checkpoints import make_model

from cap_hf.budget import CostCurve
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.checkpoints.sizes import compressed_points, measure_model, saved_tensors
from cap_hf.checkpoints.weights import count_bytes, find_weight_files, measure, to_stored
from cap_hf.targets import find_targets

SHAPES = [((48, 96), torch.float32), ((31, 33), torch.bfloat16), ((4, 6), torch.float32)]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_a_weights_bytes_are_those_that_it_is_stored_in(shape, dtype):
    points = compressed_points(shape[0] * shape[1], dtype.itemsize)
    curve = CostCurve(tuple(removed for removed, _ in points), tuple(float(cost) for _, cost in points))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(shape[0] * shape[1], generator=generator)
    flat = next(removed for removed, cost in points if cost < points[0][1]) if len(points) > 2 else 1
    for removed in {0, 1, flat - 1, flat, flat + 1, len(order) // 2, len(order) - 1, len(order)}:
        weight = torch.ones(len(order), dtype=dtype)
        weight[order[:removed]] = 0
        assert curve.at(removed) == count_bytes(to_stored("a.weight", weight.view(shape))), removed


def test_units_cost_what_their_weights_do():
    single, blocks = compressed_points(9600, 4), compressed_points(9600, 4, unit=4)
    assert blocks[0] == single[0]
    assert blocks[-1] == (2400, single[-1][1])
    at = dict(blocks)
    first = sorted(at)[2]
    assert at[first] == (9600 - 4 * first) * 4 + 1200


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_models_bytes_are_those_of_its_checkpoint(tmp_path, dtype):
    model = make_model()
    with torch.no_grad():
        for target in find_targets(model)[::2]:
            target.weight[torch.rand(target.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.7] = 0
    (model if dtype is None else model.to(dtype)).save_pretrained(tmp_path / "plain")
    compress_checkpoint(tmp_path / "plain", tmp_path / "small")
    found = measure_model(model.float(), dtype)
    assert found == measure(tmp_path / "plain") == measure(tmp_path / "small")
    # Beside the tensors a file has a header.
    assert 0 < find_weight_files(tmp_path / "small").num_bytes - found[1] < 20_000
    names = {name for name, *_ in saved_tensors(model, dtype)}
    dense, compressed = measure_model(model, dtype, names - {"classifier.bias"})
    assert dense == compressed == 3 * (4 if dtype is None else 2)


def test_what_two_names_share_counts_once():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    assert measure_model(model)[0] == 512
    model[1].weight = model[0].weight
    assert measure_model(model)[0] == 256
