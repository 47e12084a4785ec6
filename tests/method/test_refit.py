"""The refit of a layer against least squares with rows for the ridge, by NumPy, row by row."""

import pytest
import torch
from support.refits import by_hand, patches
from torch import nn

import cap_hf.method.refit as refit_module
from cap_hf.method.inverses import NotInvertibleError
from cap_hf.method.refit import LayerPairs, LeastSquares
from cap_hf.targets import Target

LAYERS = {
    "Linear": (lambda: nn.Linear(12, 7), (5, 9, 12)),
    "Linear without bias": (lambda: nn.Linear(12, 7, bias=False), (5, 9, 12)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 6, 6)),
    "Conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (5, 4, 7, 7)),
    "Conv2d by channel, without bias": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (5, 4, 7, 7)),
}


def problem_of(module, inputs, outputs, weights=None):
    """A layer's problem, of positions that all have the same weight unless they are given theirs."""
    target = Target("layer", module, module.weight[0].numel())
    weights = torch.full((1, outputs.numel() // len(module.weight)), 3.0) if weights is None else weights
    pairs = LayerPairs(target, module, inputs, outputs, weights)
    count, *means = pairs.sums()
    means = [each / count if module.bias is not None else each * 0 for each in means]
    products = [each / count for each in pairs.products(*means)]
    return target, LeastSquares(*means, *products)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("small", [False, True])
def test_each_row_is_the_least_squares_of_its_survivors(kind, small, monkeypatch):
    """Far from 0, in several parts where these are small, by shares of the rows, in batches of few.

    The inputs are windows of one example, whose weights lie side by side.
    """
    monkeypatch.setattr(refit_module, "PATCH_BYTES", 500 if small else 2**20)
    monkeypatch.setattr(refit_module, "PANEL", 5 if small else 128)
    monkeypatch.setattr("cap_hf.method.gradients.PATCH_BYTES", 500 if small else 2**20)
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    module = make().double().requires_grad_(False)
    inputs = torch.randn(shape, dtype=torch.float64) + 3
    outputs = module(inputs) + 0.1 * torch.randn(module(inputs).shape, dtype=torch.float64)
    module.weight.mul_(torch.rand(module.weight.shape) > 0.5)
    module.weight[1] = 0
    weights = 0.1 + torch.rand(1, outputs.numel() // len(module.weight), dtype=torch.float64).pow(4)
    target, problem = problem_of(module, inputs, outputs, weights)
    pruned = target.to_blocks(module.weight)
    keep = pruned != 0
    shares = [slice(0, 0), slice(0, 3), slice(3, len(pruned))]
    rows = torch.cat(
        [problem.weights(pruned, keep[share], share, 0.02, 2 * 8 * pruned.shape[1] ** 2) for share in shares]
    )
    weight, bias = by_hand(module.weight, module.bias, patches(module, inputs), outputs, 0.02, weights)
    torch.testing.assert_close(target.from_blocks(rows), weight, rtol=1e-8, atol=1e-10)
    assert torch.equal(rows != 0, keep)
    if module.bias is not None:
        torch.testing.assert_close(problem.biases(rows), bias, rtol=1e-8, atol=1e-10)


def test_second_moments_are_made_panel_by_panel_and_are_symmetric(monkeypatch):
    monkeypatch.setattr(refit_module, "PANEL", 4)
    module = nn.Linear(11, 5)
    inputs, outputs = torch.randn(3, 50, 11) + 2, torch.randn(3, 50, 5)
    weights = torch.rand(3, 50)
    _, problem = problem_of(module, inputs, outputs, weights)
    x, y, shares = inputs.flatten(0, 1).double(), outputs.flatten(0, 1).double(), weights.flatten().double()
    shares = shares / shares.sum()
    x, y = x - shares @ x, y - shares @ y
    assert problem.squares.dtype == torch.float64
    assert torch.equal(problem.squares, problem.squares.mT)
    torch.testing.assert_close(problem.squares[0], x.T * shares @ x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(problem.products[0], y.T * shares @ x, rtol=1e-5, atol=1e-6)


def test_without_a_kernel_it_is_the_same(monkeypatch):
    module = nn.Linear(12, 7).double().requires_grad_(False)
    inputs = torch.randn(40, 12, dtype=torch.float64)
    outputs = module(inputs).tanh()
    module.weight[:, ::3] = 0
    _, problem = problem_of(module, inputs, outputs)
    expected = problem.weights(module.weight, module.weight != 0, slice(0, 7), 0.1, 1)
    for place in ("refit", "reconstruction"):
        monkeypatch.setattr(f"cap_hf.method.{place}.has_kernels", lambda tensor: False)
    torch.testing.assert_close(
        problem.weights(module.weight, module.weight != 0, slice(0, 7), 0.1, 1), expected, rtol=1e-10, atol=1e-12
    )


def test_inputs_that_never_differ_move_the_bias_alone():
    module = nn.Linear(3, 2).double().requires_grad_(False)
    _, problem = problem_of(module, torch.full((6, 3), 2.0, dtype=torch.float64), torch.randn(6, 2).double())
    weights = problem.weights(module.weight, module.weight != 0, slice(0, 2), 0.1, 1)
    torch.testing.assert_close(weights, module.weight.data)
    torch.testing.assert_close(problem.biases(weights), problem.outputs[0] - 2 * weights.sum(1))


def test_what_is_not_finite_or_not_to_be_solved_is_known():
    module = nn.Linear(3, 2).double().requires_grad_(False)
    inputs = torch.randn(6, 3, dtype=torch.float64)
    _, problem = problem_of(module, inputs, module(inputs))
    assert problem.finite
    problem.squares[0, 1, 1] = -1
    with pytest.raises(NotInvertibleError):
        problem.weights(module.weight, module.weight != 0, slice(0, 2), 1e-3, 1)
    inputs[2, 1] = torch.inf
    assert not problem_of(module, inputs, module(inputs))[1].finite


@pytest.mark.parametrize("size", [16, 768])
def test_inputs_that_never_differ_leave_the_weights_as_they_are(size):
    """As behind a layer of which no weight is left: in float32 their mean is rounded, and all else is noise."""
    torch.manual_seed(0)
    module = nn.Linear(size, 5).requires_grad_(False)
    inputs = torch.randn(size).expand(40, 50, size).contiguous()
    outputs = module(inputs) + torch.randn(40, 50, 5)
    target, problem = problem_of(module, inputs, outputs, torch.rand(40, 50))
    pruned = target.to_blocks(module.weight)
    refitted = problem.weights(pruned, pruned != 0, slice(0, 5), 0.01, 2**24)
    torch.testing.assert_close(refitted.float(), pruned, rtol=0, atol=1e-6)
