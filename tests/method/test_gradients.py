"""Gradient samples against a plain loop of autograd over single examples."""

import pytest
import torch
from torch import nn

from cap_hf.errors import CAPError
from cap_hf.method import gradients as gradients_module
from cap_hf.method.gradients import GradientSamples
from cap_hf.targets import Target


def loop_gradients(module, inputs, weigh, group):
    """One autograd call an example; the mean over each group of examples."""
    grads = []
    for example in range(len(inputs)):
        loss = (module(inputs[example : example + 1]) * weigh[example : example + 1]).sum()
        grads.append(torch.autograd.grad(loss, module.weight)[0])
    return torch.stack(grads).unflatten(0, (-1, group)).mean(dim=1)


def whole(target, gradients):
    """All gradients of a layer, made in pieces of 2 rows, `(samples, rows, row)`."""
    pieces = []
    for start in range(0, len(target.weight), 2):
        height = min(2, len(target.weight) - start)
        pieces.append(target.weight.new_empty(gradients.samples, height, target.row_size))
        gradients.rows(start, start + height, pieces[-1])
    return torch.cat(pieces, dim=1)


LAYERS = {
    "linear 2-d": (nn.Linear(6, 5), (4, 6)),
    "linear 3-d": (nn.Linear(6, 5, bias=False), (4, 7, 6)),
    "linear 4-d": (nn.Linear(6, 5), (4, 3, 2, 6)),
    "conv": (nn.Conv2d(4, 6, 3), (4, 4, 8, 9)),
    "conv stride, padding, dilation": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
        (4, 4, 9, 8),
    ),
    "conv groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 7, 7)),
    "conv depthwise": (nn.Conv2d(4, 4, 5, groups=4, padding=2, stride=2), (4, 4, 8, 8)),
    "conv same": (nn.Conv2d(4, 6, (4, 3), padding="same"), (4, 4, 7, 7)),
    "conv reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 4, 7, 7)),
    "conv 1x1": (nn.Conv2d(4, 6, 1, stride=2), (4, 4, 7, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("patch_bytes", [1, 2**24])
def test_gradient_samples_equal_a_loop(monkeypatch, name, group, patch_bytes):
    """Also where patches of one sample at a time are all that may be made."""
    monkeypatch.setattr(gradients_module, "PATCH_BYTES", patch_bytes)
    module, shape = LAYERS[name]
    module = module.double()
    torch.manual_seed(0)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weigh = torch.randn_like(module(inputs))
    expected = loop_gradients(module, inputs, weigh, group)
    found = {}
    target = Target("layer", module, module.weight[0].numel())
    with GradientSamples([target], lambda t, grads: found.update({t.name: whole(t, grads)})) as hooks:
        hooks.start(len(inputs) // group)
        (module(inputs) * weigh).sum().backward()
    torch.testing.assert_close(found["layer"] / group, target.to_blocks(expected))


@pytest.mark.parametrize("parts", [[4], [1, 3], [2, 1, 1]])
def test_a_module_called_twice_gives_one_gradient(parts):
    module = nn.Linear(5, 5).double()
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = []
    for example in inputs.detach():
        loss = module(module(example).tanh()).square().sum()
        expected.append(torch.autograd.grad(loss, module.weight)[0])
    found = []
    with GradientSamples([Target("layer", module, 5)], lambda t, grads: found.append(whole(t, grads))) as hooks:
        # What a step that was given up has left is forgotten.
        hooks.start(1)
        module(inputs[:1])
        for index, part in enumerate(inputs.split(parts)):
            assert not found
            hooks.start(len(part), last=index == len(parts) - 1)
            module(module(part).tanh()).square().sum().backward()
    assert len(found) == 1
    torch.testing.assert_close(found[0], torch.stack(expected))


def test_a_layer_that_mixes_examples_is_named():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pixel_values):
            return self.linear(pixel_values.flatten(1).mean(dim=0, keepdim=True))

    model = Mixer()
    with GradientSamples([Target("linear", model.linear, 4)], lambda *_: None) as hooks:
        hooks.start(4)
        with pytest.raises(CAPError, match="linear mixes examples.*--exclude"):
            model(torch.randn(4, 1, 2, 2, requires_grad=True))
