"""How far a model's patch tokens are from the dense model's, on as many images as the memory has room for.

The patch tokens of a dataset are hundreds of times as much as one vector per image: those of the dense model are kept
of as many images as fit into `TOKEN_BYTES`, evenly spaced over the dataset.
"""

import torch
from accelerate import Accelerator

from cap_hf.errors import CAPError

TOKEN_BYTES = 128 * 2**20
SAME_KIND = "compare models of one architecture"


class PatchTokens:
    """The patch tokens that the dense model has for some images of a dataset; each process keeps those of its own.

    Args:
        size: images in the dataset.

    Attributes:
        stride: the images are those whose number is a multiple of it; 0 before the first batch.
        batches: by batch, of each part that `features_of` calls `patch`, `(images, n, d)` float32.
    """

    def __init__(self, size: int) -> None:
        self.size, self.stride = size, 0
        self.batches: list[dict[str, torch.Tensor]] = []

    def keep(self, index: int, parts: dict[str, torch.Tensor], numbers: range) -> None:
        """Keep the tokens of a batch; arguments as of `chosen`."""
        if not self.stride:
            tokens = [part for name, part in parts.items() if is_patch(name)]
            per_image = 4 * sum(part[0].numel() for part in tokens)
            self.stride = max(1, -(-self.size * per_image // TOKEN_BYTES))
        assert index == len(self.batches)
        self.batches.append(self.chosen(parts, numbers))

    def chosen(self, parts: dict[str, torch.Tensor], numbers: range) -> dict[str, torch.Tensor]:
        """Return the tokens of those images of a batch that are kept.

        Args:
            parts: what `features_of` finds.
            numbers: of the images in the dataset; those beyond its end are there a second time.
        """
        rows = [row for row, number in enumerate(numbers) if number % self.stride == 0 and number < self.size]
        return {name: part[rows].float().cpu() for name, part in parts.items() if is_patch(name)}

    @property
    def parts(self) -> set[str]:
        """Return the names of the parts that there are."""
        return {name for batch in self.batches for name in batch}


class PatchErrors:
    """Sums up the error of a model's patch tokens.

    Args:
        dense: the tokens that it is compared with.
    """

    def __init__(self, dense: PatchTokens) -> None:
        self.dense = dense
        # By part, in float64: the squared error, the dense tokens' squares, how many these are, and their sum (d,).
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, index: int, parts: dict[str, torch.Tensor], numbers: range) -> None:
        """Add a batch, the `index`-th of this process; arguments as of `PatchTokens.chosen`.

        Raises:
            CAPError: the tokens have other shapes than the dense model's.
        """
        tokens, dense = self.dense.chosen(parts, numbers), self.dense.batches[index]
        if {name: each.shape for name, each in tokens.items()} != {name: each.shape for name, each in dense.items()}:
            raise CAPError(f"the model's patch tokens are not as many and as long as the dense model's: {SAME_KIND}")
        for name, part in dense.items():
            part = part.double()
            error, count = (tokens[name].double() - part).square().sum(), torch.tensor(part.shape[0] * part.shape[1])
            found = torch.cat([torch.stack([error, part.square().sum(), count.double()]), part.sum(dim=(0, 1))])
            self.sums[name] = self.sums.get(name, 0) + found

    def relative(self, accelerator: Accelerator) -> float | None:
        """Return `sum |s - t|^2 / sum |t - mean t|^2` over the tokens t of the dense model and s of the other one.

        1 is what the mean of all dense tokens would have in the place of each. Of several parts it is the mean.

        Args:
            accelerator: whose processes add theirs up.

        Returns:
            None where there are no patch tokens, or all of them are the same.
        """
        errors = []
        for name in sorted(self.sums):
            sums = self.sums[name]
            if accelerator.num_processes > 1:
                sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
            difference, squares, count, total = sums[0], sums[1], sums[2], sums[3:]
            spread = squares - total.square().sum() / count
            # What is left of squares that cancel is rounding.
            if spread > 1e-12 * squares:
                errors.append(float(difference / spread))
        return sum(errors) / len(errors) if errors else None


def is_patch(name: str) -> bool:
    """Return whether a part of the features is one of patch tokens."""
    return name.startswith("patch")
