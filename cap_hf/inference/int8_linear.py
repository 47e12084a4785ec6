"""Linear layers that compute in int8: on the sparse kernel, and dense on PyTorch's own product; for inference."""

import functools
from typing import Any

import torch
from torch import nn

from cap_hf.checkpoints.int8 import dequantize_rows, quantize_rows
from cap_hf.inference.int8_packing import PackedInt8Weight, pack_rows, unpack_int8
from cap_hf.inference.linear import SparseWeightLinear, StoredInt8Linear
from cap_hf.inference.operators import has_int8_kernel, quantize_tokens, sparse_int8_linear, sparse_int8_mlp


class Int8WeightLinear(SparseWeightLinear):
    """The base of the layers with int8 weights, which are stored ones where there are, bit for bit, else rounded here.

    Subclasses define `store_rows`, `dense_weight` and `forward`.
    """

    float32_buffer = "scales"
    scales: torch.Tensor

    def store_rows(self, quantized: torch.Tensor, scales: torch.Tensor) -> None:
        """Take over an int8 weight `(out_features, in_features)` with its float32 scales `(out_features,)`."""
        raise NotImplementedError

    def store(self, weight: torch.Tensor) -> None:
        # Libraries take a tensor's memory as it lies.
        self.store_rows(*quantize_rows(weight.cpu().float().contiguous()))

    def take_over(self, linear: nn.Linear) -> None:
        if isinstance(linear, StoredInt8Linear):
            self.store_rows(linear.quantized, linear.scales)
        else:
            super().take_over(linear)


class SparseInt8Linear(Int8WeightLinear):
    """A Linear on the sparse int8 kernel: `(..., in_features)` -> `(..., out_features)`.

    Weights have one scale per row, inputs one per token, found anew for each input. `weight` and the state_dict give
    the weight that the layer computes with: dense, in float, no longer what it was before it was quantised.

    Of the two layers of an MLP that are computed together the first returns what the second would, `(..., out_features
    of the second)`, and the second hands that on. They can be copied, replaced or taken out only together.
    """

    has_gelu = True
    # The layer whose work this one does too, after the GELU: what is between the two stays in the processor's caches.
    # In a tuple, as a module would be registered as a child, with a second name in the state_dict.
    next: tuple["SparseInt8Linear", ...] = ()
    # Whether the layer before does the work of this one, which then hands on what has the size of its outputs.
    is_done = False
    offsets: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor
    corrections: torch.Tensor

    def extra_repr(self) -> str:
        behind = f", with the layer behind it: {self.next[0].out_features}" if self.next else ""
        return super().extra_repr() + behind + (", computed by the layer before" if self.is_done else "")

    def store_rows(self, quantized: torch.Tensor, scales: torch.Tensor) -> None:
        packed = pack_rows(quantized, scales)
        for name in ("values", "offsets", "starts", "order", "scales", "corrections"):
            self.register_buffer(name, getattr(packed, name), persistent=False)
        self.row_block, self.col_block = packed.row_block, packed.col_block

    def packed_weight(self) -> PackedInt8Weight:
        """Return the weight as the kernel reads it; it shares memory with this layer."""
        buffers: dict[str, Any] = self._buffers  # a module's attributes take longer to look up than a small product
        return PackedInt8Weight(
            buffers["values"],
            buffers["offsets"],
            buffers["starts"],
            buffers["order"],
            buffers["scales"],
            buffers["corrections"],
            self.out_features,
            self.in_features,
            self.row_block,
            self.col_block,
        )

    def dense_weight(self) -> torch.Tensor:
        return dequantize_rows(unpack_int8(self.packed_weight()), self.scales)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.check_device(input)
        if self.is_done and input.shape[-1] == self.out_features:
            return input
        if not self.next:
            return sparse_int8_linear(input, self.packed_weight(), self.bias, gelu=self.gelu)
        (second,) = self.next
        return sparse_int8_mlp(input, self.packed_weight(), self.bias, second.packed_weight(), second.bias)


class DenseInt8Linear(Int8WeightLinear):
    """A Linear on PyTorch's dense int8 product (oneDNN), for layers whose zeros make nothing faster where int8 does.

    Inputs and weights are quantised as in `SparseInt8Linear`, and the sums are the same; outputs may differ by float32
    rounding.
    """

    zero_points: torch.Tensor

    def store_rows(self, quantized: torch.Tensor, scales: torch.Tensor) -> None:
        # In a layout of oneDNN's own, which is no buffer: `Module.to` cannot move it, nor need it.
        self.packed = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("zero_points", torch.zeros(len(scales), dtype=torch.int64), persistent=False)

    def dense_weight(self) -> torch.Tensor:
        return dequantize_rows(self.packed.to_dense().t().contiguous(), self.scales)

    @property
    def extra_bytes(self) -> int:
        return self.packed.numel()

    # A tensor in oneDNN's layout can be neither copied nor pickled: its numbers can.
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": self.packed.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = torch.ops.onednn.qlinear_prepack(self.packed.t().contiguous(), None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.check_device(input)
        # The compiler needs the operator; a call of it through PyTorch's dispatcher takes 30 microseconds more.
        multiply = torch.ops.cap_hf.dense_int8_linear if torch.compiler.is_compiling() else multiply_dense
        return multiply(input, self.packed, self.scales, self.zero_points, self.bias)


def multiply_dense(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return the product of a `DenseInt8Linear`; an operator of its own, as the compiler does not know oneDNN's layout.

    Args:
        x: `(..., cols)`.
        packed: int8 weight `(cols, rows)` in oneDNN's layout.
        scales: float32 `(rows,)`.
        zero_points: int64 `(rows,)`, all 0.
        bias: `(rows,)`.
    """
    if x.dim() == 0 or x.shape[-1] != packed.shape[0]:
        raise RuntimeError(f"dense int8: x has shape {tuple(x.shape)}, its last size must be {packed.shape[0]}")
    quantized, of_tokens = quantize_tokens(x.reshape(-1, x.shape[-1]))
    # Of inputs that have one scale, 1, and are stored plus 128; the tokens' own scales come after it.
    y = torch.ops.onednn.qlinear_pointwise(
        quantized, 1.0, 128, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    y = y.mul_(of_tokens) if bias is None else torch.addcmul(bias.float(), y, of_tokens)
    return y.to(x.dtype).view(*x.shape[:-1], -1 if x.numel() else len(scales))


torch.library.define(
    "cap_hf::dense_int8_linear",
    "(Tensor x, Tensor packed, Tensor scales, Tensor zero_points, Tensor? bias) -> Tensor",
)
# The packed weight's layout has a dispatch key of its own.
torch.library.impl("cap_hf::dense_int8_linear", ("CPU", "MkldnnCPU"), multiply_dense)


@torch.library.register_fake("cap_hf::dense_int8_linear")
def fake_dense_int8_linear(x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
    """Return an empty output of the operator: `x (..., cols)` -> `(..., rows)`, in x's dtype."""
    return x.new_empty((*x.shape[:-1], args[1].shape[0]))


def refuse_backward(*args: Any) -> None:
    """Raise an error, as the kernels' operators do: a compiled backward pass would leave the layer's part out."""
    raise NotImplementedError("cap_hf::dense_int8_linear is for inference only: it has no derivative")


torch.library.register_autograd("cap_hf::dense_int8_linear", refuse_backward)


@functools.cache
def has_dense_int8() -> bool:
    """Return whether PyTorch has a dense int8 product here that adds up without saturation: x86 with VNNI."""
    return has_int8_kernel() and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
