"""Run 2:4 weights on the sparse tensor cores of NVIDIA GPUs, through PyTorch's own semi-structured tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from cap_hf.errors import CAPError

DTYPES = (torch.float16, torch.bfloat16)
# PyTorch's backends, CUTLASS and cuSPARSELt, both take weights whose rows and columns are multiples of these.
ROWS, COLS = 32, 64


def is_semi_structured(weight: torch.Tensor) -> bool:
    """Return whether a weight `(rows, cols)` is half precision, of a shape that GPUs take, and 2:4 along its rows."""
    if weight.dtype not in DTYPES or weight.shape[0] % ROWS or weight.shape[1] % COLS:
        return False
    return bool(((weight.detach().reshape(-1, 4) != 0).sum(dim=1) <= 2).all())


def to_semi_structured(linear: nn.Linear) -> None:
    """Compress the 2:4 weight of a Linear, in place; its state_dict stays that of a dense Linear.

    Raises:
        CAPError: the weight is not on an NVIDIA GPU of compute capability 8.0 or newer.
    """
    check_device(linear.weight.device)
    compressed = to_sparse_semi_structured(linear.weight.detach().contiguous())
    linear.weight = nn.Parameter(compressed, requires_grad=False)
    linear.register_state_dict_post_hook(save_dense)


def check_device(device: torch.device) -> None:
    """Raise a CAPError if a device has no sparse tensor cores."""
    if device.type != "cuda" or torch.version.cuda is None:
        raise CAPError(
            f"2:4 runs on NVIDIA GPUs and the model is on {device}: move it to 'cuda', or take another backend"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise CAPError(f"2:4 needs a GPU of compute capability 8.0 or newer, and this one has {major}.{minor}")


def save_dense(linear: nn.Linear, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    """Put the dense weight into a state_dict, in place of the compressed one, which safetensors cannot hold."""
    state_dict[f"{prefix}weight"] = linear.weight.detach().to_dense()


def find_semi_structured(linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Return those of some layers whose 2:4 weights the sparse tensor cores of their GPU take.

    Raises:
        CAPError: the device has no sparse tensor cores, or no weight is 2:4.
    """
    chosen = {name: linear for name, linear in linears.items() if is_semi_structured(linear.weight)}
    if not chosen:
        raise CAPError(
            "no weight is 2:4 in float16 or bfloat16 and of a shape that GPUs take: prune with --allocation 2:4 and "
            "load with dtype='bfloat16'"
        )
    for linear in chosen.values():
        check_device(linear.weight.device)
    return chosen
