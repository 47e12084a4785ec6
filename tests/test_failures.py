"""What a model fails on is one line; what somebody else looks for reaches them."""

import pytest
import torch
from accelerate.utils import find_executable_batch_size
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.errors import CAPError, ModelFailure
from cap_hf.towers import see

FAILURES = {
    "another size": (
        torch.zeros(2, 3, 12, 12),
        r"\(2, 3, 12, 12\) \(its config tells of \(batch, 3, 8, 8\)\): Input image",
    ),
    "other channels": (
        torch.zeros(2, 1, 8, 8),
        r"\(2, 1, 8, 8\) \(its config tells of \(batch, 3, 8, 8\)\): .* channel",
    ),
    "channels last": (torch.zeros(2, 8, 8, 3), r"8, 8\): channels come first, see permute\(0, 3, 1, 2\)\)"),
    "one image": (torch.zeros(3, 8, 8), r"8, 8\): the batch is missing, see unsqueeze\(0\)\)"),
    "whole numbers": (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "pixel_values are torch.uint8, as an image has them"),
    "an array": (torch.zeros(2, 3, 8, 8).numpy(), "fails on pixel_values of a ndarray"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_a_model_fails_on_is_one_line(case):
    pixels, message = FAILURES[case]
    with pytest.raises(CAPError, match=message) as caught:
        see(build("ViT"), {"pixel_values": pixels})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        # accelerate's find_executable_batch_size knows these by their type and words.
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            torch.OutOfMemoryError,
            "^CUDA out of memory. Tried to allocate 2 GiB$",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), RuntimeError, "^DefaultCPUAllocator"),
        (MemoryError("no room"), MemoryError, "^no room$"),
        (TypeError("a mistake"), ModelFailure, r"ViT.* fails on pixel_values of \(2, 3, 8, 8\) .*: a mistake$"),
        (CAPError("a hook's own"), CAPError, "^a hook's own$"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    ],
)
def test_errors_from_within_a_forward_pass(error, kind, message):
    model = build("ViT")

    def hook(*_):
        raise error

    model.vit.layers[1].register_forward_hook(hook)
    with pytest.raises(kind, match=message):
        see(model, {"pixel_values": torch.zeros(2, 3, 8, 8)})


def test_what_another_process_causes_is_not_blamed_on_the_images(monkeypatch):
    """The launcher ends the run with a line of its own."""
    model = build("ViT")
    model.vit.layers[1].register_forward_hook(lambda *_: torch.distributed.barrier())
    with pytest.raises(ValueError, match="process group") as caught:
        see(model, {"pixel_values": torch.zeros(2, 3, 8, 8)})
    assert not isinstance(caught.value, CAPError)


def test_a_batch_size_that_fits_is_looked_for():
    """A CAPError in the place of PyTorch's own ended the search at its first batch size."""
    tried = []

    def full(module, args):
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    @find_executable_batch_size(starting_batch_size=8, reduce_batch_size_fn=lambda: tried[-1] // 2)
    def collect(batch_size):
        tried.append(batch_size)
        model = build("ViT")
        model.vit.layers[0].mlp.fc1.register_forward_pre_hook(full)
        return CAPCompressor(model, CAPConfig(num_grads=8), disable_tqdm=True).collect(
            random_batches(model, 8, (batch_size,))
        )

    assert collect().prune(0.5).sparsity == 0.5
    assert tried == [8, 4]
