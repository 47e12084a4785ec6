"""The second moment of layers' inputs against plain products."""

import pytest
import torch
from support.models import ARCHITECTURES, build, random_batches
from support.sums import fill
from torch.nn import functional as F

from cap_hf.collection.input_sums import InputSums
from cap_hf.errors import CAPError
from cap_hf.method.fisher import BlockFisher
from cap_hf.method.inputs import num_moments
from cap_hf.targets import find_targets


def test_the_sums_do_not_depend_on_the_order_of_the_examples():
    """In which processes differ: each sums its own batches, and all of them are added up."""
    model = build("ViT")
    batches = [(batch, 4, None) for batch in random_batches(model, 8, sizes=(4,) * 6)]
    targets = find_targets(model, 8)
    forwards, backwards = (fill(InputSums(targets), model, each) for each in (batches, batches[::-1]))
    for target in targets:
        sums = forwards.sums[target.name]
        assert sums.dtype == torch.float32
        assert len(sums) == num_moments(target) == target.row_size // 8
        assert sums.full().equal(backwards.sums[target.name].full())


def test_inputs_that_are_not_finite_name_the_layer():
    model = build("ViT")
    model.vit.layers[1].layernorm_after.weight.data[0] = float("inf")
    with pytest.raises(CAPError, match=r"inputs are NaN or infinite in vit.layers.1.mlp"):
        fill(InputSums(find_targets(model)), model, [(random_batches(model, 8)[0], 4, None)])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_input_hessian_equals_plain_products(name):
    model = build(name).double()
    targets = find_targets(model)
    batch = random_batches(model, ARCHITECTURES[name][1])[0]
    statistic = fill(InputSums(targets), model, [(batch, 4, None)])
    everything = {target.name: slice(0, target.num_blocks) for target in targets}
    hessian = BlockFisher(statistic.sums, statistic.count, {}, everything, shared=True)
    inputs = {}
    handles = [
        target.module.register_forward_hook(
            lambda module, args, output, name=target.name: inputs.update({name: args[0]})
        )
        for target in targets
    ]
    with torch.no_grad():
        model(pixel_values=batch["pixel_values"])
    for handle in handles:
        handle.remove()
    for target in targets:
        # The squared output of random weights is what the Hessian has to predict, whatever the layer's kind.
        weight = torch.randn_like(target.weight)
        if target.is_conv:
            module = target.module
            pad = (module.padding[1],) * 2 + (module.padding[0],) * 2
            padded = F.pad(inputs[target.name], pad)
            outputs = F.conv2d(padded, weight, None, module.stride, 0, module.dilation, module.groups)
            outputs = outputs.movedim(1, -1)
        else:
            outputs = F.linear(inputs[target.name], weight)
        expected = outputs.reshape(-1, len(weight)).square().sum(dim=0)
        rows = target.to_blocks(weight)
        matrices = hessian.damped(target, slice(None), 0.0) * hessian.count
        found = torch.einsum("bi,bij,bj->b", rows, matrices, rows)
        torch.testing.assert_close(found, expected)
