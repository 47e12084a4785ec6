"""What a gradient sample costs."""

import pytest
import torch
from support.models import build, random_batches

from cap_hf import CAPConfig
from cap_hf.collection import costs as costs_module
from cap_hf.collection.costs import forward_seconds, measure
from cap_hf.collection.examples import CalibrationExamples
from cap_hf.distributed.processes import Processes
from cap_hf.method.gradients import GradientSamples
from cap_hf.method.losses import LabelLoss
from cap_hf.targets import find_targets, weight_layers


def measured(model, side: int):
    examples = CalibrationExamples(random_batches(model, side), CAPConfig(), Processes())
    return measure(model, examples.peek(), find_targets(model), LabelLoss())


def test_the_bytes_of_a_sample_are_those_of_what_autograd_keeps():
    """Twice the layers keep nearly twice the bytes, twice the tokens too."""
    sizes = {}
    for name, changes in {"base": {}, "deep": {"num_hidden_layers": 4}, "long": {"image_size": 16}}.items():
        model = build("ViT", **changes)
        side = changes.get("image_size", 8)
        sizes[name] = measured(model, side).bytes
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert 1.6 < sizes["deep"] / sizes["base"] < 2.1
    assert 2.0 < sizes["long"] / sizes["base"] < 4.5


def test_patches_of_convolutions_are_counted():
    """A 3x3 convolution on 8 channels of 16x16 positions has 72 entries per position."""
    costs = measured(build("ResNet"), 16)
    assert costs.patches > 0
    assert 0 < costs.held <= costs.patches
    assert measured(build("ViT"), 8).patches == 0


@pytest.mark.parametrize(("name", "side"), [("ViT", 8), ("ResNet", 16)])
def test_work_and_what_is_kept_are_those_of_each_layer(name, side):
    model = build(name)
    costs, given, made = measured(model, side), {}, {}
    for layer_name, module in weight_layers(model).items():

        def note(module, args, output, layer_name=layer_name):
            given[layer_name], made[layer_name] = args[0][0], output[0]

        module.register_forward_hook(note)
    model(**random_batches(model, side)[0])
    layers = weight_layers(model)
    # One multiply-add for each weight that an output has, and each entry of the output.
    expected = {module: made[key].numel() * module.weight[0].numel() for key, module in layers.items()}
    assert costs.work == expected
    # Embedding and head, which are no targets, are work too.
    assert len(expected) > len(costs.order)
    assert costs.kept_of == {key: given[key].nbytes + made[key].nbytes for key in costs.order}
    assert max(costs.kept_of.values()) < costs.kept < sum(costs.kept_of.values())


def test_the_order_is_that_of_the_backward_pass():
    model = build("ViT")
    targets, met = find_targets(model), []
    (batch,) = random_batches(model, 8, sizes=(2,))
    with GradientSamples(targets, lambda target, gradients: met.append(target.name)) as hooks:
        hooks.start(2)
        model(**batch).loss.backward()
    assert measured(model, 8).order == met
    assert sorted(met) == sorted(target.name for target in targets)


def test_the_first_step_is_not_timed(monkeypatch):
    """A device sets itself up in it: its seconds would be taken for those of every step."""
    calls = []
    monkeypatch.setattr(costs_module, "backward", lambda *args: calls.append(1) or torch.zeros(()))
    clock = iter(range(100))
    monkeypatch.setattr(costs_module.time, "perf_counter", lambda: (len(calls), next(clock))[0])
    costs = measured(build("ViT"), 8)
    assert len(calls) == 2
    assert costs.seconds == 1 / 2


def test_what_sums_inputs_alone_needs_no_loss():
    """Neither labels nor logits are asked for, and nothing is kept in memory."""
    model = build("ViT").vit
    examples = CalibrationExamples([{"pixel_values": torch.zeros(4, 3, 8, 8)}], CAPConfig(), Processes())
    costs = measure(model, examples.peek(), find_targets(model), None)
    assert (costs.samples, costs.bytes, costs.order) == (4, 0, [])
    assert costs.seconds > 0


def test_the_positions_of_a_sample_are_counted():
    """Tokens of a ViT: four patches and the class; pixels of a convolution's output."""
    assert set(measured(build("ViT"), 8).positions.values()) == {5}
    model = build("ResNet")
    costs, outputs = measured(model, 16), {}
    for target in find_targets(model):
        target.module.register_forward_hook(
            lambda module, args, output, name=target.name: outputs.update({name: output[0, 0].numel()})
        )
    model(**random_batches(model, 16)[0])
    assert costs.positions == outputs


def test_a_forward_pass_is_timed_after_the_first_and_leaves_the_model_as_it_was(monkeypatch):
    model = build("ResNet").train()
    norms = [module.running_mean.clone() for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    times = iter([0.0, 100.0, 200.0, 216.0, 300.0, 317.0])
    monkeypatch.setattr(costs_module.time, "perf_counter", lambda: next(times))
    batch = {"pixel_values": torch.zeros(20, 3, 16, 16), "labels": torch.zeros(20, dtype=torch.long)}
    assert forward_seconds(model, batch) == 16 / costs_module.EXAMPLES
    assert model.training
    after = [module.running_mean for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(torch.equal(*pair) for pair in zip(norms, after, strict=True))


def test_mixed_precision_is_timed_in_mixed_precision():
    model, seen = build("ViT"), set()
    model.register_forward_hook(lambda module, args, output: seen.add(output.logits.dtype))
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    forward_seconds(model, batch)
    assert seen == {torch.float32}
    seen.clear()
    forward_seconds(model, batch, torch.bfloat16)
    assert seen == {torch.bfloat16}


def test_positions_are_counted_alike_with_a_loss_and_without():
    for name, side in (("ViT", 8), ("ResNet", 16)):
        model = build(name)
        examples = CalibrationExamples(random_batches(model, side), CAPConfig(), Processes())
        without = measure(model, examples.peek(), find_targets(model), None)
        assert without.positions == measured(model, side).positions
