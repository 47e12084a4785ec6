"""The relative error of patch tokens, by hand, of all images and of as many as fit."""

import pytest
import torch
from accelerate import Accelerator

from cap_hf.data import patches
from cap_hf.data.patches import PatchErrors, PatchTokens
from cap_hf.errors import CAPError

SIZE, BATCH = 10, 4


def features(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "class": torch.randn(SIZE, 1, 5, generator=generator),
        "patch": 3 + torch.randn(SIZE, 6, 5, generator=generator),
        "patch 1": 10 * torch.randn(SIZE, 2, 3, generator=generator),
    }


def batches(parts):
    """Batches with the numbers of their images; the last one begins again with the first images."""
    for index, first in enumerate(range(0, SIZE, BATCH)):
        rows = [number % SIZE for number in range(first, first + BATCH)]
        yield index, {name: part[rows] for name, part in parts.items()}, range(first, first + BATCH)


def measure(dense, sparse):
    tokens = PatchTokens(SIZE)
    for batch in batches(dense):
        tokens.keep(*batch)
    errors = PatchErrors(tokens)
    for batch in batches(sparse):
        errors.add(*batch)
    return tokens, errors.relative(Accelerator())


def by_hand(dense, sparse, rows):
    found = []
    for name in ("patch", "patch 1"):
        t, s = dense[name][rows].double(), sparse[name][rows].double()
        found.append(((s - t) ** 2).sum() / ((t - t.mean(dim=(0, 1))) ** 2).sum())
    return float(sum(found) / 2)


# Bytes of an image: 4 * (6 * 5 + 2 * 3) = 144.
@pytest.mark.parametrize(("room", "stride"), [(144 * SIZE, 1), (144 * SIZE - 1, 2), (144 * 4, 3), (1, 1440)])
def test_the_error_is_that_of_evenly_spaced_images_each_counted_once(monkeypatch, room, stride):
    monkeypatch.setattr(patches, "TOKEN_BYTES", room)
    dense, sparse = features(0), features(1)
    tokens, error = measure(dense, sparse)
    assert tokens.stride == stride
    assert tokens.parts == {"patch", "patch 1"}
    assert error == pytest.approx(by_hand(dense, sparse, list(range(0, SIZE, stride))))
    assert measure(dense, dense)[1] == 0


def test_the_mean_token_in_every_place_has_error_1():
    dense = features(0)
    flat = {name: part.mean(dim=(0, 1)).expand_as(part) for name, part in dense.items()}
    assert measure(dense, flat)[1] == pytest.approx(1, rel=1e-5)


def test_what_has_no_patch_tokens_or_equal_ones_has_no_error():
    dense = {"class": features(0)["class"]}
    tokens, error = measure(dense, dense)
    assert (tokens.parts, error) == (set(), None)
    same = {"patch": torch.full((SIZE, 3, 2), 0.1)}
    assert measure(same, {"patch": torch.zeros(SIZE, 3, 2)})[1] is None


def test_other_shapes_are_refused():
    dense = features(0)
    for sparse in ({"patch": dense["patch"]}, dense | {"patch": dense["patch"][:, :3]}):
        with pytest.raises(CAPError, match="patch tokens are not as many and as long as the dense model's: compare"):
            measure(dense, sparse)
