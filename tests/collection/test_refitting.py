"""The walk through dense and sparse model at once, against both of them run apart, layer after layer.

That two processes give what one does is checked in test_batch_norm.py, by the same run.
"""

import copy

import pytest
import torch
from support.models import build, random_batches
from support.quadratics import inverse_of
from support.refits import by_hand, patches, sampled_loss, weights_by_hand
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from cap_hf import CAPCompressor, CAPConfig, find_targets
from cap_hf.collection.refitting import parameters_of, refit, refittable, work_of
from cap_hf.collection.removal_paths import RemovalPaths
from cap_hf.collection.running import unchanged_on_error
from cap_hf.collection.solver import Solver
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.method.panels import eliminate_in_torch
from cap_hf.method.refit import LeastSquares
from cap_hf.report import RefitReport


class Small(nn.Module):
    """Convolutions in groups and without bias, norms of both kinds, a layer called twice, one never, two sharing."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)
        self.second, self.layer_norm = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False), nn.LayerNorm(6)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.twice, self.never = nn.Linear(6, 6), nn.Linear(6, 6)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.last = nn.Linear(6, 3)

    def forward(self, pixel_values):
        maps = self.second(self.norm(self.first(pixel_values)).relu()).relu()
        tokens = self.layer_norm(maps.flatten(2).mT)
        tokens = self.left(tokens) * self.right(tokens).sigmoid()
        tokens = self.twice(self.twice(tokens).relu()) + self.other(self.one(tokens).relu())
        return ImageClassifierOutput(logits=self.last(tokens.mean(1)))


def case(name: str):
    """A dense model in float64, a sparse copy, the copy's targets, and pixels."""
    torch.manual_seed(0)
    dense = (Small() if name == "Small" else build(name)).double().eval()
    if name == "Dinov2":
        with torch.no_grad():
            for layer in dense.dinov2.encoder.layer:
                # What one channel adds is too little to make up for anything with it.
                layer.layer_scale2.lambda1[3] = 1e-6
    pixels = torch.randn(24, 4, 7, 7) if name == "Small" else random_batches(dense, 8, (24,))[0]["pixel_values"]
    sparse = copy.deepcopy(dense)
    targets = find_targets(sparse)
    for target in targets:
        target.weight.data.mul_(torch.rand(target.weight.shape) > 0.6)
    return dense, sparse, targets, pixels.double()


def layers_of(dense, targets):
    """What gives the layers of a dense model."""
    modules = {target.name: dense.get_submodule(target.name) for target in targets}
    return lambda target: (modules[target.name].weight.data, getattr(modules[target.name].bias, "data", None))


def caught(model, name, pixels):
    """What goes into a module and comes out of it."""
    calls = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    with torch.no_grad():
        model(pixels)
    handle.remove()
    return calls[0]


def residual_of(model, name):
    """The layer that returns what a target puts out times a factor, and something else; and that factor."""
    for end, scale in ((".mlp.fc2", None), (".mlp.down_proj", "layer_scale2.lambda1")):
        if name.endswith(end):
            layer = model.get_submodule(name.removesuffix(end))
            return name.removesuffix(end), 1.0 if scale is None else layer.get_parameter(scale).detach()
    return None


def wanted_of(model, dense, name, pixels):
    """What goes into a target of a model, and what is to come out of it, all layers before it being refitted.

    In a residual layer that is what makes the layer return what it does in the dense model.
    """
    (inputs, made), (_, outputs) = (caught(each, name, pixels) for each in (model, dense))
    found = residual_of(model, name)
    if found is None:
        return inputs, outputs
    layer, scales = found
    (_, returned), (_, goal) = (caught(each, layer, pixels) for each in (model, dense))
    wanted = made + (goal - returned) / scales
    if isinstance(scales, torch.Tensor):
        lost = scales.abs() <= 1e-3 * scales.abs().max()
        wanted[..., lost] = outputs[..., lost]
    return inputs, wanted


def weights_in(dense, name, pixels):
    """The weights of the positions of a layer, where the examples are the first ones."""
    return weights_by_hand(dense, name, {"pixel_values": pixels}, sampled_loss(range(len(pixels))))


def whole(batch):
    """The batches of a process that has all examples."""
    return [({"pixel_values": batch}, 0)]


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Small"])
def test_each_layer_is_refitted_for_what_the_refitted_ones_before_it_give(name, caplog):
    dense, sparse, targets, pixels = case(name)
    alone = ["twice", "never", "one"] if name == "Small" else []
    expected, order, hooked = copy.deepcopy(sparse), [], copy.deepcopy(sparse)
    for target in targets:
        if target.name not in alone:
            hooked.get_submodule(target.name).register_forward_hook(lambda *_, name=target.name: order.append(name))
    hooked(pixels[:1])
    for each in order:
        inputs, outputs = wanted_of(expected, dense, each, pixels)
        module, weights = expected.get_submodule(each), weights_in(dense, each, pixels)
        found = by_hand(module.weight.data, module.bias, patches(module, inputs), outputs, 0.03, weights)
        module.weight.data.copy_(found[0])
        if module.bias is not None:
            module.bias.data.copy_(found[1])
    parts = [{"pixel_values": part, "labels": torch.zeros(len(part))} for part in pixels.split(10)]
    batches = zip(parts, (0, 10, 20), strict=True)
    done = []
    config = CAPConfig(refit_examples=30, refit_ridge=0.03)
    report = refit(
        sparse, targets, layers_of(dense, targets), batches, config, Processes(), lambda *count: done.append(count)
    )
    assert report == RefitReport(24, 0.03, alone)
    works = {target.name: work_of(target) for target in targets}
    assert done == [(1, works[each]) for each in order]
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[key], value, rtol=1e-7, atol=1e-9)
    assert "ended after 24 of 30 examples to refit to" in caplog.text
    assert ("Not refitted" in caplog.text) == bool(alone)
    assert not sparse.training
    assert all(parameter.requires_grad for parameter in sparse.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in sparse.modules())


@pytest.mark.parametrize("name", ["Dinov2", "Small"])
def test_a_dense_model_stays_and_a_sparse_one_comes_nearer(name):
    dense, sparse, targets, pixels = case(name)

    def run(model):
        refit(model, find_targets(model), layers_of(dense, targets), whole(pixels), CAPConfig(), Processes())

    same = copy.deepcopy(dense)
    run(same)
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(same.state_dict()[key], value, rtol=1e-8, atol=1e-10)
    before = (sparse(pixels).logits - dense(pixels).logits).square().mean()
    zeros = {target.name: target.weight == 0 for target in targets}
    run(sparse)
    assert (sparse(pixels).logits - dense(pixels).logits).square().mean() < before / 2
    assert all(torch.equal(target.weight == 0, zeros[target.name]) for target in targets)


@pytest.mark.parametrize("allocation", ["global", "2:4", "1x4"])
def test_a_sequential_method_chooses_for_what_reaches_the_layer(allocation):
    """Each layer's survivors are those of the elimination of all rows, one after the other, about their minima."""
    model = build("ViT").double()
    dense, (batch,) = copy.deepcopy(model), random_batches(model, 8, (24,))
    with torch.no_grad():
        # What is 0 in the dense model stays so.
        for each in (dense, model):
            each.vit.layers[0].mlp.fc1.weight[3, 2:5] = 0
    rule = {"pattern": allocation} if allocation == "1x4" else {"allocation": allocation}
    config = CAPConfig(method="sparsegpt", num_grads=24, refit_examples=24, refit_ridge=0.03, **rule)
    compressor = CAPCompressor(model, config).collect([batch])
    report = compressor.prune(0.5)
    zeros = [layer.num_zeros for layer in report.layers]
    before = {target.name: target.weight != 0 for target in compressor.targets}
    assert [layer.num_zeros for layer in compressor.refit([batch]).layers] == zeros
    same = 0
    for target in compressor.targets:
        name, pattern = target.name, compressor.config.structure
        inputs, outputs = wanted_of(model, dense, name, batch["pixel_values"])
        weights = weights_in(dense, name, batch["pixel_values"])
        shares = weights.flatten() / weights.sum()
        x, y = (each.flatten(0, -2) - shares @ each.flatten(0, -2) for each in (inputs, outputs))
        squares = x.T * shares @ x
        matrix = squares + 0.03 * squares.diagonal().mean() * torch.eye(len(squares)).double()
        old = dense.get_submodule(name).weight.data
        best = old + (y.T * shares @ x - old @ squares) @ inverse_of(matrix)
        paths = []
        for row, (start, alive) in enumerate(zip(best, old != 0, strict=True)):
            within = matrix[alive][:, alive]
            start = inverse_of(within) @ (matrix @ start)[alive]
            full = torch.zeros(len(alive)).double().masked_scatter(alive, start)
            own = matrix.masked_fill(~(alive[:, None] & alive), 0) + torch.diag((~alive).double())
            found = eliminate_in_torch(full[None], inverse_of(own)[None], pattern)
            costs = found.losses[0].cummax(0).values
            paths += [(float(cost), row, int(entry)) for cost, entry in zip(costs, found.order[0], strict=True)]
        keep = torch.ones_like(old, dtype=torch.bool)
        unit = 1 if pattern is None else pattern.unit
        gone = int((target.weight == 0).unflatten(1, (-1, unit)).all(dim=2).sum())
        for _, row, entry in sorted(paths, key=lambda path: path[0])[:gone]:
            keep[row, entry * unit : (entry + 1) * unit] = False
        keep &= old != 0
        assert torch.equal(target.weight != 0, keep), name
        same += torch.equal(keep, before[name])
        found = by_hand(old * keep, target.module.bias, patches(target.module, inputs), outputs, 0.03, weights)
        torch.testing.assert_close((target.weight.data, target.module.bias.data), found, rtol=1e-7, atol=1e-9)
    assert same < len(compressor.targets)


def test_which_layers_can_be_refitted():
    _, sparse, targets, pixels = case("Small")
    assert refittable(sparse, targets, {"pixel_values": pixels}) == {"first", "second", "left", "right", "last"}


class Mixing(nn.Module):
    """Has the tokens first where the examples are to be."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.layer(pixel_values.flatten(2).permute(2, 0, 1)).mean(0))


def test_what_is_wrong_is_one_line_and_what_changes_is_put_back(monkeypatch):
    dense, sparse, targets, pixels = case("Small")
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    layers = layers_of(dense, targets)
    broken = pixels.clone()
    broken[3, 1, 2, 2] = torch.inf
    with unchanged_on_error(parameters_of(targets)):
        with pytest.raises(CAPError, match="one example per process at least"):
            refit(sparse, targets, layers, [], CAPConfig(), Processes())
        with pytest.raises(CAPError, match=r"what reaches first, what .* or the gradient there, is not finite"):
            refit(sparse, targets, layers, whole(broken), CAPConfig(), Processes())
    mixing = Mixing().double()
    (target,) = find_targets(mixing)
    # Where a microbatch shows it, and where only all examples do.
    for part, rows in ((pixels, "49 rows for 4"), (pixels[..., :4, :4], "16 rows for 48")):
        with pytest.raises(CAPError, match=rf"layer mixes examples \(its input has {rows} examples\)"):
            refit(mixing, [target], layers_of(mixing, [target]), whole(part), CAPConfig(), Processes())
    solve, solved = LeastSquares.biases, []

    def interrupted(problem, weights):
        solved.append(weights)
        if len(solved) == 3:
            raise KeyboardInterrupt
        return solve(problem, weights)

    monkeypatch.setattr(LeastSquares, "biases", interrupted)
    with pytest.raises(KeyboardInterrupt), unchanged_on_error(parameters_of(targets)):
        refit(sparse, targets, layers, whole(pixels), CAPConfig(), Processes())
    assert len(solved) == 3
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())


def test_the_dense_layers_are_those_of_the_beginning():
    model = build("ViT")
    targets = find_targets(model)
    paths = RemovalPaths(targets, Solver(CAPConfig(method="magnitude"), None), Processes())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for target in targets:
        target.weight.data.zero_()
        target.module.bias.data.zero_()
    for target in targets:
        weight, bias = paths.dense_layer(target)
        assert torch.equal(weight, before[f"{target.name}.weight"])
        assert torch.equal(bias, before[f"{target.name}.bias"])
