"""The weight files of a checkpoint folder: which they are, what they hold, how few bytes would do."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cap_hf.checkpoints.compression import (
    COMPRESSED_INDEX_NAME,
    COMPRESSED_NAME,
    FORMAT_VERSION,
    INT8_FORMAT_VERSION,
    QUANT_METHOD,
    SCALES,
    VALUES,
    pack,
)
from cap_hf.checkpoints.explaining import explain_format
from cap_hf.checkpoints.files import check_file, load_file, open_safetensors
from cap_hf.checkpoints.folder import MODEL_CONFIG_NAME, check_types, read_json, shorten
from cap_hf.checkpoints.int8 import is_for_int8, pack_int8
from cap_hf.errors import CAPError

PLAIN_NAME, PLAIN_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
# What a compressed tensor's entries in a file's header take, at most.
HEADER_BYTES = 512


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a checkpoint, in order, and their index if there is one."""

    paths: list[Path]
    compressed: bool
    index: Path | None = None

    @property
    def num_bytes(self) -> int:
        """Return what they take on the disk."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def have_digests(self) -> bool:
        """Return whether each file tells what its tensors' bytes were when it was written.

        Raises:
            CAPError: a file is damaged.
        """
        return all(check_file(path).digests is not None for path in self.paths)

    @property
    def have_int8(self) -> bool:
        """Return whether some of the weights are stored in int8.

        Raises:
            CAPError: a file cannot be read.
        """
        for path in self.paths:
            with open_safetensors(path) as file:
                if any(name.endswith(f".{SCALES}") for name in file.keys()):  # noqa: SIM118
                    return True
        return False


def find_weight_files(folder: str | Path) -> WeightFiles:
    """Return the weights that `from_pretrained` would load from a folder.

    Raises:
        CAPError: there are none as safetensors, an index names a file that is not there, or cap_hf is too old.
    """
    folder = Path(folder)
    check_version(folder)
    for name, index, compressed in (
        (COMPRESSED_NAME, COMPRESSED_INDEX_NAME, True),
        (PLAIN_NAME, PLAIN_INDEX_NAME, False),
    ):
        if (folder / name).is_file():
            return WeightFiles([folder / name], compressed)
        if (folder / index).is_file():
            weight_map: Any = read_json(folder / index).get("weight_map")
            check_types(weight_map, dict[str, str], f"{folder / index}: weight_map")
            shards = sorted(set(weight_map.values()))
            if not shards:
                raise CAPError(f"{folder / index} names no file")
            for shard in shards:
                # os.path takes a name that no file can have for one that is not there.
                if Path(shard).name != shard or not os.path.isfile(folder / shard):
                    raise CAPError(f"{folder / index} names {shorten(repr(shard))}, which is not in {folder}")
            return WeightFiles([folder / shard for shard in shards], compressed, folder / index)
    raise CAPError(explain_format(folder))


def check_version(folder: Path) -> None:
    """Raise a CAPError if a newer cap_hf compressed a checkpoint, as config.json says: its files would seem damaged."""
    if not (folder / MODEL_CONFIG_NAME).is_file():
        return
    stated: Any = read_json(folder / MODEL_CONFIG_NAME).get("quantization_config")
    if isinstance(stated, dict) and stated.get("quant_method") == QUANT_METHOD:
        version = stated.get("format_version", FORMAT_VERSION)
        if version not in (FORMAT_VERSION, INT8_FORMAT_VERSION):
            raise CAPError(f"{folder} has format version {shorten(repr(version))}: update cap_hf to load it")


def iterate_weights(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of a checkpoint, dense, in the dtype it is stored in, one file in memory at a time.

    Raises:
        CAPError: as `find_weight_files` and `load_file`: a file is damaged.
    """
    for path in find_weight_files(folder).paths:
        yield from load_file(path).items()


def to_stored(name: str, tensor: torch.Tensor, int8: bool = False) -> dict[str, torch.Tensor]:
    """Return a tensor under the names it is stored by: in parts if that is smaller, else whole.

    Args:
        name: of the tensor.
        tensor: on the CPU.
        int8: round it, if it is sparse; else all is stored bit for bit.

    Raises:
        CAPError: a weight to be rounded is not finite.
    """
    # transformers' hook puts weights together; a vector is not worth its header.
    if not name.endswith(".weight") or tensor.dim() < 2:
        return {name: tensor}
    parts = pack_int8(tensor, name) if int8 and is_for_int8(tensor) else pack(tensor)
    if parts is None or count_bytes(parts) + HEADER_BYTES >= tensor.numel() * tensor.element_size():
        return {name: tensor}
    return {f"{name}.{suffix}": part for suffix, part in parts.items()}


def measure(folder: str | Path) -> tuple[int, int]:
    """Return the bytes of a checkpoint's tensors: dense, and as a compressed checkpoint would store them.

    All bytes are read, and compared with the digests that the files have.

    Raises:
        CAPError: as `iterate_weights`.
    """
    dense = compressed = 0
    for name, tensor in iterate_weights(folder):
        dense += tensor.numel() * tensor.element_size()
        compressed += count_bytes(to_stored(name, tensor))
    return dense, compressed


def count_negative_zeros(folder: str | Path) -> int:
    """Return how many values of a compressed checkpoint's packed weights are -0.0, kept because a sign is a bit too.

    Raises:
        CAPError: as `find_weight_files`.
    """
    count = 0
    for path in find_weight_files(folder).paths:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(f".{VALUES}"):
                    values = file.get_tensor(name)
                    if values.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                        count += int(((values == 0) & torch.signbit(values)).sum())
    return count


def count_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Return what tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
