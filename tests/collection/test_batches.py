"""What data come in becomes a batch, or one line that says what a batch must be."""

import numpy as np
import pytest
import torch
from support.models import build, random_batches
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BatchFeature

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.batches import check_dataloader, joined, read, to_batch
from cap_hf.errors import CAPError

PIXELS, LABELS = torch.randn(4, 3, 8, 8), torch.tensor([1, 0, 1, 1])
BOTH = ("pixel_values", "labels")
MADE = {
    "dict": {"pixel_values": PIXELS, "labels": LABELS},
    "pair": (PIXELS, LABELS),
    "list of two": [PIXELS, LABELS],
    "names beside": {"pixel_values": PIXELS, "labels": LABELS, "file": ["a", "b", "c", "d"], "size": None},
    "uneven lists beside": {"pixel_values": PIXELS, "labels": LABELS, "boxes": [[1], [2, 3], [], [4]]},
    "arrays": {"pixel_values": PIXELS.numpy(), "labels": LABELS.numpy()},
    "list of labels": {"pixel_values": PIXELS, "labels": LABELS.tolist()},
    "lists of tensors": {"pixel_values": list(PIXELS), "labels": list(LABELS)},
    "of an image processor": BatchFeature({"pixel_values": PIXELS, "labels": LABELS}),
    "the number of an epoch beside": {"pixel_values": PIXELS, "labels": LABELS, "epoch": 3},
    "a count beside": {"pixel_values": PIXELS, "labels": LABELS, "num_boxes": torch.tensor([5])},
    "big-endian": {"pixel_values": PIXELS.numpy().astype(">f4"), "labels": LABELS.numpy().astype(">i8")},
    "flipped": {"pixel_values": PIXELS.flip(3).numpy()[..., ::-1], "labels": LABELS.flip(0).numpy()[::-1]},
    "128 bits": {"pixel_values": PIXELS.numpy().astype(np.longdouble), "labels": LABELS},
    "another name of labels": {"pixel_values": PIXELS, "label": LABELS},
}
REFUSED = {
    "three": ((PIXELS, LABELS, LABELS), "a batch is a tuple: give dicts of tensors with pixel_values and labels"),
    "no images": ((LABELS, PIXELS), "a batch is a tuple"),
    "text": ("a.png", "a batch is a str"),
    "no labels": ({"pixel_values": PIXELS}, "a batch has pixel_values; it needs pixel_values and labels"),
    "None": ({"pixel_values": PIXELS, "labels": None}, "a batch has pixel_values; it needs pixel_values and labels"),
    "other names": ({"image": PIXELS, "label": LABELS}, "a batch has image, labels; it needs pixel_values and labels"),
    "empty": ({}, "a batch has nothing in it; it needs"),
    "names for labels": ({"pixel_values": PIXELS, "labels": ["cat"] * 4}, "'labels' of a batch is a list of str"),
    "images of all sizes": (
        {"pixel_values": [torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], "labels": [0, 1]},
        "'pixel_values' of a batch is a list of Tensor",
    ),
    "a single number": ({"pixel_values": PIXELS, "labels": torch.tensor(3)}, "is a single number, 3: give a tensor"),
    "fewer": ({"pixel_values": PIXELS, "labels": LABELS[:3]}, "4 pixel_values and 3 labels: give as many"),
}


@pytest.mark.parametrize("case", MADE)
def test_what_can_be_made_a_batch_is(case):
    batch = to_batch(MADE[case], BOTH)
    assert batch.keys() == set(BOTH)
    assert torch.equal(batch["pixel_values"].float(), PIXELS)
    assert torch.equal(batch["labels"], LABELS)


def test_images_alone_are_enough_where_no_label_is_needed():
    for given in (PIXELS, (PIXELS,), [PIXELS], PIXELS.numpy()):
        (found,) = to_batch(given, ("pixel_values",)).values()
        assert torch.equal(found, PIXELS)


def test_what_the_model_takes_is_kept_and_must_be_whole():
    mask = torch.ones(4, 2)
    given = {"pixel_values": PIXELS, "pixel_attention_mask": mask}
    assert to_batch(given, ("pixel_values",)).keys() == {"pixel_values"}
    assert to_batch(given, ("pixel_values",), {"pixel_attention_mask"})["pixel_attention_mask"] is mask
    for value, message in (
        (mask[:3], "4 pixel_values and 3 pixel_att"),
        (True, "is a bool"),
        (["a"] * 4, "list of str"),
    ):
        with pytest.raises(CAPError, match=message):
            to_batch(given | {"pixel_attention_mask": value}, ("pixel_values",), {"pixel_attention_mask"})


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_is_one_line(case):
    given, message = REFUSED[case]
    with pytest.raises(CAPError, match=message) as caught:
        to_batch(given, BOTH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [{"pixel_values": PIXELS}, PIXELS, PIXELS.numpy()])
def test_one_batch_is_no_dataloader(given):
    with pytest.raises(CAPError, match="one batch was given in the place of a dataloader: put it into a list"):
        check_dataloader(given)


@pytest.mark.parametrize("given", [None, 5, "data"])
def test_nor_is_what_holds_no_batches(given):
    with pytest.raises(CAPError, match=f"{given!r} is no dataloader: give a DataLoader"):
        check_dataloader(given)


def test_pairs_prune_as_dicts_do():
    """And pixels in float64, as NumPy has them, are made what the model computes in."""
    model = build("ViT")
    (batch,) = random_batches(model, 8, (8,))
    loader = DataLoader(TensorDataset(batch["pixel_values"].double(), batch["labels"]), batch_size=8)
    weights = []
    for batches in ([batch], loader):
        model = build("ViT")
        CAPCompressor(model, CAPConfig(num_grads=8), disable_tqdm=True).collect(batches).prune(0.5)
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


class Broken(Dataset):
    """Has eight examples; the seventh cannot be read."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 6:
            raise KeyError("image")
        return {"pixel_values": PIXELS[0]}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_dataset_says_is_one_line_with_the_examples(workers):
    loader = DataLoader(Broken(), batch_size=2, num_workers=workers)
    with pytest.raises(
        CAPError, match=r"failed at batch 3 \(examples 6 to 7\): KeyError: there is no .*image"
    ) as caught:
        list(read(loader))
    assert "\n" not in str(caught.value)
    with pytest.raises(CAPError, match="failed at batch 1: ValueError: not this one"):
        list(read(each if each else (_ for _ in ()).throw(ValueError("not this one")) for each in (1, 0)))


def test_only_images_of_one_size_go_through_a_model_at_once():
    assert joined([]) == {}
    batches = [{"pixel_values": torch.zeros(2, 3, side, side), "labels": torch.zeros(2)} for side in (8, 8, 9)]
    assert {name: value.shape for name, value in joined(batches[:2]).items()} == {"pixel_values": (4, 3, 8, 8)}
    with pytest.raises(CAPError, match=r"differ in size, .*\(3, 8, 8\).* and .*\(3, 9, 9\).*--refit false"):
        joined(batches)
