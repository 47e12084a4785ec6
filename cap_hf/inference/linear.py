"""Linear layers that hold and multiply the non-zero weights only; for inference."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cap_hf.checkpoints.int8 import dequantize_rows
from cap_hf.errors import CAPError
from cap_hf.inference.operators import sparse_linear
from cap_hf.inference.packing import PackedWeight, pack, unpack


class SparseWeightLinear(nn.Module):
    """The base of the sparse layers: they stand where an nn.Linear stood, and their state_dict is that of one.

    Subclasses hold the weight in buffers that are not saved, and define `store`, `dense_weight` and `forward`.
    """

    # Whether the layer can end with the GELU that follows it, and whether it does.
    has_gelu = False
    gelu = False
    # The buffer that stays float32 whatever the dtype of inputs and outputs becomes.
    float32_buffer = "values"
    values: torch.Tensor
    # What works on weights refuses a model that has such layers, see `cap_hf.models.usable`.
    inference_only = True

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.dtype = dtype_of(linear)
        self.take_over(linear)
        self.train(linear.training)

    def take_over(self, linear: nn.Linear) -> None:
        """Store the weight of the Linear that this layer takes the place of."""
        self.store(linear.weight.detach())

    def store(self, weight: torch.Tensor) -> None:
        """Take over a dense weight `(out_features, in_features)`."""
        raise NotImplementedError

    def dense_weight(self) -> torch.Tensor:
        """Return the weight as a dense float32 tensor `(out_features, in_features)`, made anew."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """Dense and made anew at each access: for code that looks at a Linear's weight, not for computing."""
        return self.dense_weight().to(self.dtype)

    def weight_bytes(self) -> int:
        """Return the bytes that the weight and its index take in memory."""
        return self.extra_bytes + sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def extra_bytes(self) -> int:
        """Return the bytes of what is neither a parameter nor a buffer."""
        return 0

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}" + (", gelu=True" if self.gelu else "")

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list,
        unexpected_keys: list,
        error_msgs: list,
    ) -> None:
        name = f"{prefix}weight"
        weight = state_dict.get(name)
        if weight is None:
            missing_keys.append(name)
        elif weight.shape != (self.out_features, self.in_features):
            error_msgs.append(f"{name} has shape {tuple(weight.shape)}, not {(self.out_features, self.in_features)}")
        else:
            self.store(weight.detach())
        rest = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        # `.half()` and the like change the dtype of inputs and outputs; the kernel computes in float32, unrounded.
        kept = getattr(self, self.float32_buffer)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=kept.device)).dtype
        super()._apply(fn, recurse)
        setattr(self, self.float32_buffer, kept.to(getattr(self, self.float32_buffer).device))
        return self

    def check_device(self, x: torch.Tensor) -> None:
        """Raise a CAPError if the input is not on the CPU."""
        if x.device.type != "cpu":
            raise CAPError(
                f"this model was optimised for inference on the CPU and got an input on {x.device}: "
                "keep it there, or load it anew for another device"
            )


class SparseLinear(SparseWeightLinear):
    """A Linear on the C++ kernel: `(..., in_features)` -> `(..., out_features)`, float32 inside."""

    has_gelu = True
    offsets: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor

    def store(self, weight: torch.Tensor) -> None:
        packed = pack(weight.cpu())
        for name in ("values", "offsets", "starts", "order"):
            self.register_buffer(name, getattr(packed, name), persistent=False)
        self.row_block, self.col_block = packed.row_block, packed.col_block

    def packed_weight(self) -> PackedWeight:
        """Return the weight as the kernel reads it; it shares memory with this layer."""
        buffers: dict[str, Any] = self._buffers  # a module's attributes take longer to look up than a small product
        return PackedWeight(
            buffers["values"],
            buffers["offsets"],
            buffers["starts"],
            buffers["order"],
            self.out_features,
            self.in_features,
            self.row_block,
            self.col_block,
        )

    def dense_weight(self) -> torch.Tensor:
        return unpack(self.packed_weight())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.check_device(input)
        return sparse_linear(input, self.packed_weight(), self.bias, gelu=self.gelu)


class CSRLinear(SparseWeightLinear):
    """A Linear on PyTorch's own CSR product, for machines without a compiler."""

    starts: torch.Tensor
    columns: torch.Tensor

    def store(self, weight: torch.Tensor) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            csr = weight.cpu().float().to_sparse_csr()
        self.register_buffer("starts", csr.crow_indices().int(), persistent=False)
        self.register_buffer("columns", csr.col_indices().int(), persistent=False)
        self.register_buffer("values", csr.values(), persistent=False)

    def csr_weight(self) -> torch.Tensor:
        """Return the weight as a sparse CSR tensor; it shares memory with this layer."""
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.starts, self.columns, self.values, shape, check_invariants=False)

    def dense_weight(self) -> torch.Tensor:
        return self.csr_weight().to_dense()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.check_device(input)
        columns = input.reshape(-1, self.in_features).float().t()
        y = (self.csr_weight() @ columns).t()
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*input.shape[:-1], self.out_features).to(input.dtype)


class StoredInt8Linear(nn.Linear):
    """A Linear with an int8 weight as a checkpoint stores it, until a faster layer takes its place.

    It computes with the floats that the weight stands for, made anew at each call.

    Args:
        linear: whose place it takes; its weight, and its bias until it is loaded, may be on the meta device.
        quantized: int8 `(out_features, in_features)`.
        scales: float32 `(out_features,)`.
    """

    def __init__(self, linear: nn.Linear, quantized: torch.Tensor, scales: torch.Tensor) -> None:
        # That of Linear would make a weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        # No buffers: transformers makes those anew that are not saved.
        self.quantized, self.scales = quantized, scales
        self.train(linear.training)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # Linear's can be written
        return dequantize_rows(self.quantized, self.scales).to(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight, self.bias)

    def to_linear(self) -> nn.Linear:
        """Return a dense Linear with the floats that the weight stands for."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight), self.bias
        return linear.train(self.training)


def stored_weight(linear: nn.Linear) -> torch.Tensor:
    """Return the numbers that a Linear holds as its weight `(out_features, in_features)`: floats, or int8."""
    return linear.quantized if isinstance(linear, StoredInt8Linear) else linear.weight


def dtype_of(linear: nn.Linear) -> torch.dtype:
    """Return the dtype of a Linear's inputs and outputs."""
    return linear.dtype if isinstance(linear, StoredInt8Linear) else linear.weight.dtype


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module that takes another's place the hooks of the other; handles of these hooks can still remove them."""
    names: list[Any] = [name for name in vars(old) if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]
    for name in names:
        setattr(new, name, getattr(old, name))


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights and buffers of a model; what two of them share counts once."""
    held = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values()) + sum(getattr(module, "extra_bytes", 0) for module in model.modules())
