"""A model that nothing else is to notice what was done with."""

import pytest
import torch
from support.models import build, random_batches
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.running import backward, frozen
from cap_hf.errors import CAPError
from cap_hf.method.losses import LabelLoss
from cap_hf.towers import see


def test_each_part_of_the_model_is_put_back_as_it_was():
    model = build("ViT").train()
    model.vit.layers[0].eval()
    model.classifier.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyboardInterrupt
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needed


@pytest.mark.parametrize("name", ["gradient_checkpointing", "grad_checkpointing"])
def test_nothing_is_computed_again_in_the_backward_pass(name):
    """The hooks got no gradient at all, and the weights were removed as if they did not matter."""

    class Recomputing(torch.nn.Sequential):
        def forward(self, *inputs):
            if getattr(self, name):
                return checkpoint(super().forward, *inputs, use_reentrant=True)
            return super().forward(*inputs)

    sums = []
    for recomputes in (False, True):
        model = build("ViT")
        block = Recomputing(model.vit.layers[0].mlp.fc1)
        setattr(block, name, recomputes)
        model.vit.layers[0].mlp.fc1 = block
        compressor = CAPCompressor(model, CAPConfig(num_grads=8)).collect(random_batches(model, 8))
        assert getattr(block, name) == recomputes
        sums.append(compressor.fisher.sums)
    assert all(torch.equal(sums[0][name].full(), sums[1][name].full()) for name in sums[0])


def test_the_loss_is_summed_over_examples_and_divided_by_the_group():
    model = build("ViT")
    batch = random_batches(model, 8)[0]
    expected = F.cross_entropy(see(model, batch).logits, batch["labels"], reduction="sum") / 2
    with frozen(model):
        torch.testing.assert_close(backward(model, batch, LabelLoss(), group=2), expected.detach())


def test_a_model_that_returns_tuples_is_collected_like_any():
    """`return_dict=False` ended in an AttributeError."""
    sums = []
    for named in (True, False):
        model = build("ViT")
        if not named:
            plain = model.forward
            model.forward = lambda *args, plain=plain, **kwargs: plain(*args, **kwargs).to_tuple()
        compressor = CAPCompressor(model, CAPConfig(num_grads=8)).collect(random_batches(model, 8))
        sums.append(compressor.fisher.sums)
    assert all(torch.equal(sums[0][name].full(), sums[1][name].full()) for name in sums[0])


def test_labels_that_training_would_pass_over_are_refused():
    """-100 gave a loss without that example, divided by a count with it."""
    model = build("ViT")
    batches = random_batches(model, 8)
    batches[0]["labels"][1] = -100
    with pytest.raises(CAPError, match="has label -100"):
        CAPCompressor(model, CAPConfig(num_grads=8)).collect(batches)
    for batch in batches:
        del batch["labels"]
    with pytest.raises(CAPError, match="needs pixel_values and labels"):
        CAPCompressor(model, CAPConfig(num_grads=8, fisher_loss="labels")).collect(batches)
    CAPCompressor(model, CAPConfig(num_grads=8, fisher_loss="sampled")).collect(batches).prune(0.5)
