"""Refits what is left of a layer to what the dense layer makes: least squares with a ridge, row by row.

Pruning takes each layer by itself, with the inputs that the dense model gives it. What reaches a sparse layer comes out
of layers that are sparse themselves. So, in the order of the forward pass, each row's weights w that are left and its
bias b become those that minimise

    sum v (y - w x - b)^2 / sum v + r |w - w0|^2

over the positions of all examples, of weight v: x what really reaches the layer, y what the dense layer makes of its
own inputs (asymmetric reconstruction, arXiv 1505.06798, section 3.3), w0 the weights as they were pruned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from cap_hf.kernels.build import has_kernels
from cap_hf.method.gradients import PATCH_BYTES, unfold_parts
from cap_hf.method.inverses import check_factors
from cap_hf.method.reconstruction import reconstruct
from cap_hf.targets import Target

# Relative to its mean, the standard deviation below which an input in float32 does not differ but is rounded.
ROUNDING = 16 * torch.finfo(torch.float32).eps
# Rows of second moments that are made at a time, up to the diagonal: what is beyond it mirrors them.
PANEL = 128


class LayerPairs:
    """What goes into a layer beside what is to come out of it, position by position, so many at a time as fit a cache.

    Args:
        target: whose layer it is.
        module: the one of its modules that was called.
        inputs: of the layer; Linear `(b, ..., in)`, Conv2d `(b, in, h, w)`.
        outputs: that are wanted of it, in the shape that it gives.
        weights: v of each position, `(examples, positions)`, in the order in which these lie in the outputs.
    """

    def __init__(
        self, target: Target, module: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor
    ) -> None:
        self.target, self.module = target, module
        self.groups = getattr(module, "groups", 1)
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        self.inputs, self.outputs = inputs.to(dtype), outputs.to(dtype)
        # Windows of one example lie side by side.
        self.weights = weights.to(dtype).reshape(len(inputs), -1)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield inputs, outputs and weights of some positions at a time.

        Inputs are `(groups, n, row)`, in the order of a target's row, outputs `(groups, n, out / groups)`, weights
        `(n, 1)`.
        """
        if isinstance(self.module, nn.Conv2d):
            for part, patches in unfold_parts(self.module, self.inputs, self.outputs):
                outputs = self.outputs[part].flatten(2).unflatten(1, (self.groups, -1))
                yield (
                    patches.transpose(0, 1).flatten(1, 2),
                    outputs.permute(1, 0, 3, 2).flatten(1, 2),
                    self.weights[part].reshape(-1, 1),
                )
            return
        inputs, outputs = self.inputs.flatten(0, -2), self.outputs.flatten(0, -2)
        weights = self.weights.reshape(-1, 1)
        step = max(1, PATCH_BYTES // (inputs.shape[1] * inputs.element_size()))
        for start in range(0, len(inputs), step):
            part = slice(start, start + step)
            yield inputs[None, part], outputs[None, part], weights[part]

    def sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the sum of the weights `()`, and the weighted sums of inputs and outputs, by group.

        They are in float64; those of the positions that lie in a cache together are summed in the layer's dtype.
        """
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.inputs.device)
        count, inputs = zeros(()), zeros(self.groups, self.target.row_size)
        outputs = zeros(self.groups, len(self.target.weight) // self.groups)
        for x, y, v in self:
            # As matrix products, which read x and y once and write nothing of their size.
            inputs += (v.mT @ x)[:, 0]
            outputs += (v.mT @ y)[:, 0]
            count += v.sum(dtype=torch.float64)
        return count, inputs, outputs

    def products(self, inputs: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sums of `x x^T` and `y x^T` over positions, in float64, of deviations from means.

        Args:
            inputs: `(groups, row)`, subtracted from each x: differences of large sums would lose what is small.
            outputs: `(groups, out / groups)`, likewise.

        Returns:
            `(groups, row, row)` and `(groups, out / groups, row)`.
        """
        size = inputs.shape[1]
        panels = [slice(start, min(start + PANEL, size)) for start in range(0, size, PANEL)]
        squares = inputs.new_zeros(self.groups, size, size)
        products = inputs.new_zeros(self.groups, outputs.shape[1], size)
        for x, y, v in self:
            x, y = x - inputs[:, None].to(x.dtype), y - outputs[:, None].to(y.dtype)
            weighted = v * x
            products += y.mT @ weighted
            for panel in panels:
                squares[:, panel, : panel.stop] += weighted[..., panel].mT @ x[..., : panel.stop]
        for panel in panels:
            squares[:, : panel.start, panel] = squares[:, panel, : panel.start].mT
            # Made whole, and rounded otherwise on either side of the diagonal.
            corner = squares[:, panel, panel].tril()
            squares[:, panel, panel] = corner + corner.tril(-1).mT
        return squares, products


@dataclass
class LeastSquares:
    """The problem that all rows of a layer share, in float64.

    Attributes:
        inputs: `(groups, row)`, means of the inputs; 0 where a layer has no bias, whose rows go through the origin.
        outputs: `(groups, out / groups)`, means of the outputs; likewise.
        squares: `(groups, row, row)`, the inputs' second moments about these means.
        products: `(groups, out / groups, row)`, those of outputs with inputs.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor

    @property
    def finite(self) -> bool:
        """Return whether every number is."""
        return all(bool(each.isfinite().all()) for each in (self.squares, self.products))

    def quadratics(
        self, anchors: torch.Tensor, rows: slice, ridge: float, step: int
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield the objective of some rows, as a quadratic: where it is least, and its matrix, so many at a time.

        It is least at `w* = w0 + (H + r I)^-1 (c - H w0)`, H being `squares` and c a row of `products`; its matrix
        is `H + r I`.

        Args:
            anchors: `(out, row)`, w0 of all rows.
            rows: which are wanted.
            ridge: r, relative to the mean diagonal of H in each group; greater than 0.
            step: how many rows at a time, see `rows_at_once`.

        Yields:
            Which of the wanted rows, counted from the first; their minima `(n, row)` in float64; their matrices
            `(n, row, row)`, which may be one, expanded.

        Raises:
            NotInvertibleError: H + r I is not positive definite; `block` is the group, of those that the rows are in.
        """
        if rows.start == rows.stop:
            return
        height = self.products.shape[1]
        groups = slice(rows.start // height, -(-rows.stop // height))
        matrices = self.squares[groups].clone()
        diagonal = matrices.diagonal(dim1=-2, dim2=-1)
        # Inputs that never differ say nothing: their weights stay.
        scale = diagonal.mean(dim=1, keepdim=True)
        rounded = (ROUNDING * self.inputs[groups]).square().mean(dim=1, keepdim=True)
        diagonal += torch.where(scale > rounded, ridge * scale, 1.0)
        factors, info = torch.linalg.cholesky_ex(matrices)
        check_factors(matrices, info)
        old = anchors.double().unflatten(0, (-1, height))[groups]
        pull = self.products[groups] - old @ self.squares[groups]
        best = (old + torch.cholesky_solve(pull.mT, factors).mT).flatten(0, 1)
        first = rows.start - groups.start * height
        count = rows.stop - rows.start
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            index = torch.arange(first + part.start, first + part.stop) // height
            shared = bool(index[0] == index[-1])
            each = matrices[index[0]].expand(len(index), -1, -1) if shared else matrices[index.to(matrices.device)]
            yield part, best[first + part.start : first + part.stop], each

    def weights(
        self, anchors: torch.Tensor, keep: torch.Tensor, rows: slice, ridge: float, batch_bytes: int
    ) -> torch.Tensor:
        """Return the refitted weights of some rows, `(n, row)` in float64, 0 outside `keep`.

        Args:
            anchors, rows, ridge: as for `quadratics`.
            keep: `(n, row)` bool, of the wanted rows.
            batch_bytes: as for `rows_at_once`.

        Raises:
            NotInvertibleError: as of `quadratics`.
        """
        refitted = self.squares.new_zeros(keep.shape)
        for part, best, matrices in self.quadratics(anchors, rows, ridge, self.rows_at_once(batch_bytes)):
            refitted[part] = reconstruct(best, matrices, keep[part])
        return refitted

    def rows_at_once(self, batch_bytes: int, copied: bool = False) -> int:
        """Return how many rows are solved at a time: all that share a matrix which a kernel reads where it lies.

        Args:
            batch_bytes: of matrices at a time, where each row has its own.
            copied: whether each row has its own in any case.
        """
        groups, outputs, size = self.products.shape
        if groups == 1 and not copied and has_kernels(self.products):
            return outputs
        return max(1, batch_bytes // (8 * size**2))

    def biases(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the best biases `(out,)` for weights `(out, row)`, in float64: what the means leave over."""
        by_group = weights.double().unflatten(0, (-1, self.products.shape[1]))
        return (self.outputs - (by_group @ self.inputs[..., None])[..., 0]).flatten()
