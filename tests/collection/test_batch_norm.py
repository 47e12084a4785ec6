"""Statistics of batch norm: those of all examples as one batch, layer after layer, however they are cut up."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.launching import launch
from support.models import build, random_batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.batch_norm import batch_norms, recalibrate_batch_norm
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError


def statistics(model):
    return {
        name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))
    }


class Small(nn.Module):
    """Two convolutions with batch norm, dropout that must not drop, and a batch norm that nobody calls."""

    def __init__(self, layer=nn.BatchNorm2d):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), layer(4)
        self.drop = nn.Dropout(0.5)
        self.second, self.last = nn.Conv2d(4, 5, 3), layer(5, momentum=0.7)
        self.unused = nn.BatchNorm1d(3)

    def forward(self, pixel_values):
        return self.last(self.second(self.drop(self.norm(self.first(pixel_values)).relu())))


def by_hand(model, pixels):
    """The statistics of `Small`, by NumPy in float64, each layer with the new ones of the layer before."""
    expected = {}
    for conv, name in (("first", "norm"), ("second", "last")):
        weight, bias = (getattr(getattr(model, conv), part).double() for part in ("weight", "bias"))
        values = F.conv2d(pixels, weight, bias).detach().numpy().swapaxes(0, 1).reshape(len(weight), -1)
        mean, variance = values.mean(1), values.var(1, ddof=1)
        expected |= {f"{name}.running_mean": mean, f"{name}.running_var": variance}
        norm = getattr(model, name)
        scale = norm.weight.detach().double().numpy() / np.sqrt(variance + norm.eps)
        shift = norm.bias.detach().double().numpy() - mean * scale
        pixels = F.conv2d(pixels, weight, bias) * torch.tensor(scale)[:, None, None]
        pixels = (pixels + torch.tensor(shift)[:, None, None]).relu()
    return expected


@pytest.mark.parametrize("sizes", [(12,), (5, 1, 6)])
def test_they_are_those_of_all_examples_layer_after_layer(sizes):
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.normal_()
        # Far from 0, where a difference of squares would lose the variance.
        model.first.bias.add_(1000)
    pixels = torch.randn(12, 3, 8, 8)
    batches = [{"pixel_values": part, "labels": torch.zeros(len(part))} for part in pixels.split(sizes)]
    before = statistics(model)
    assert recalibrate_batch_norm(model, iter(batches), Processes()) == ["norm", "last"]
    after, expected = statistics(model), by_hand(model, pixels.double())
    for name, value in expected.items():
        # float32's own error at 1000.
        np.testing.assert_allclose(after[name].numpy(), value, rtol=2e-3 if "var" in name else 1e-4, atol=1e-3)
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("unused"))


def test_one_layer_is_as_training_with_one_whole_batch():
    torch.manual_seed(0)
    model, oracle = Small(), Small()
    oracle.load_state_dict(model.state_dict())
    pixels = torch.randn(9, 3, 8, 8)
    recalibrate_batch_norm(model, [{"pixel_values": pixels}], Processes())
    oracle.norm.momentum = 1.0
    oracle.norm.train()(oracle.first(pixels))
    torch.testing.assert_close(statistics(model)["norm.running_mean"], oracle.norm.running_mean)
    torch.testing.assert_close(statistics(model)["norm.running_var"], oracle.norm.running_var)


def test_the_cut_into_batches_changes_nothing_and_old_statistics_do_not_matter():
    model, other = build("ResNet"), build("ResNet")
    batch = random_batches(model, 16, (12,))[0]
    parts = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 7), slice(7, 12))]
    for module in batch_norms(other).values():
        module.running_mean.add_(3)
        module.running_var.mul_(9)
    assert recalibrate_batch_norm(model, [batch], Processes()) == list(batch_norms(model))
    recalibrate_batch_norm(other, parts, Processes())
    first, second = statistics(model), statistics(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_everything_else_is_as_it_was():
    model = build("ResNet").train()
    model.resnet.encoder.stages[0].eval()
    model.classifier[1].bias.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    modes = [module.training for module in model.modules()]
    required = [parameter.requires_grad for parameter in model.parameters()]
    recalibrate_batch_norm(model, random_batches(model, 16), Processes())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_constant_channel_and_a_single_value_give_no_nan():
    model = Small()
    with torch.no_grad():
        model.first.weight[1] = 0
    recalibrate_batch_norm(model, [{"pixel_values": torch.randn(4, 3, 8, 8)}], Processes())
    assert model.norm.running_var[1] == 0
    assert model.norm.running_mean[1] == model.first.bias[1]
    assert model.eval()(torch.randn(2, 3, 8, 8)).isfinite().all()
    # One example whose only position leaves nothing to take a variance of.
    recalibrate_batch_norm(model, [{"pixel_values": torch.randn(1, 3, 5, 5)}], Processes())
    assert torch.equal(model.last.running_var, torch.zeros(5))


def test_a_layer_that_is_called_twice_has_the_statistics_of_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, pixel_values):
            self.norm(pixel_values[:, :3])
            return self.norm(pixel_values[:, 3:])

    model, values = Twice(), torch.randn(7, 6, dtype=torch.float64)
    recalibrate_batch_norm(model.double(), [{"pixel_values": values}], Processes())
    both = torch.cat([values[:, :3], values[:, 3:]])
    torch.testing.assert_close(model.norm.running_mean, both.mean(0))
    torch.testing.assert_close(model.norm.running_var, both.var(0))


def test_what_is_wrong_is_said_in_one_line_and_changes_nothing():
    with pytest.raises(CAPError, match="ViTForImageClassification has no batch norm layer"):
        recalibrate_batch_norm(build("ViT"), [], Processes())
    model = build("ResNet")
    before = statistics(model)
    with pytest.raises(CAPError, match="one example per process at least"):
        recalibrate_batch_norm(model, [], Processes())
    batch = random_batches(model, 16)[0]
    with torch.no_grad():
        list(batch_norms(model).values())[3].weight[0] = torch.inf
    with pytest.raises(CAPError, match=r"batch norm layer resnet\.encoder.* is not finite"):
        recalibrate_batch_norm(model, [batch], Processes())
    after = statistics(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_layers_without_statistics_of_their_own_are_left():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    assert batch_norms(model) == {}


SCRIPT = """
import sys
from accelerate import Accelerator
from collection.test_batch_norm import refit_and_estimate
from safetensors.torch import save_file

accelerator = Accelerator(cpu=True)
model = refit_and_estimate(accelerator)
save_file(model.state_dict(), f"{sys.argv[1]}/{accelerator.process_index}.safetensors")
accelerator.end_training()
"""


def refit_and_estimate(accelerator=None):
    """A ResNet in float64 after pruning, a refit and new statistics."""
    model = build("ResNet").double()
    (batch,) = random_batches(model, 16, (12,))
    # Three batches: two processes do not get as many.
    loader = DataLoader([{"pixel_values": pixels} for pixels in batch["pixel_values"]], batch_size=4)
    compressor = CAPCompressor(model, CAPConfig(method="magnitude", refit_examples=12), accelerator)
    compressor.prune(0.5)
    assert compressor.refit(loader).refit.examples == 12
    compressor.recalibrate_batch_norm(loader)
    return model


def test_two_processes_give_what_one_does(tmp_path):
    model = refit_and_estimate()
    (tmp_path / "script.py").write_text(SCRIPT)
    launch(2, str(tmp_path), script=tmp_path / "script.py")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12)
        assert torch.equal(first[name], second[name])
