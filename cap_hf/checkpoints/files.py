"""One safetensors file: written with a digest of each tensor, opened, checked, read.

The digests lie in the file's metadata under `cap_digests`: 32 hexadecimal digits per stored tensor, in the order of the
sorted names. Files of earlier versions of cap_hf, and of anybody else, have none.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from cap_hf.checkpoints.compression import INTEGERS, PARTS, SCALES, SHAPE, VALUES, check_parts
from cap_hf.checkpoints.int8 import check_int8_parts, unpack_any
from cap_hf.errors import CAPError, reason

DIGESTS = "cap_digests"
DIGEST_LENGTH = 32

# How a file begins that Git LFS has not fetched.
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class FileContents:
    """What the header of a safetensors file says.

    Attributes:
        names: of the tensors that are stored, parts of packed ones among them.
        num_entries: of all tensors once they are unpacked.
        dense_bytes: what these take.
        int8_bytes: what those of them that are stored in int8 take less as int8 numbers.
        dtypes: of those of them that are floating point, by their names, as the file calls it, such as BF16; of one in
            int8, the dtype that it had.
        digests: of each stored tensor, by its name; None if the file has none.
    """

    names: set[str]
    num_entries: int
    dense_bytes: int
    int8_bytes: int
    dtypes: dict[str, str]
    digests: dict[str, str] | None


def save_file(tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write tensors on the CPU to a safetensors file, with their digests."""
    names = sorted(tensors)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda name: digest(name, tensors[name]), names)
        metadata = {"format": "pt", DIGESTS: "".join(digests)}
    safetensors.torch.save_file(dict(tensors), path, metadata=metadata)


def digest(name: str, tensor: torch.Tensor) -> str:
    """Return 128 bits of SHA-256, in hexadecimal digits, of a tensor's name, dtype, shape and bytes.

    Args:
        name: as it is stored.
        tensor: on the CPU.
    """
    content = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if tensor.numel():
        content.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()[:DIGEST_LENGTH]


def digest_names(names: Iterable[str]) -> str:
    """Return SHA-256 of tensor names in any order: another one means missing weights, or ones under other names."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def check_file(path: str | Path) -> FileContents:
    """Return what a safetensors file holds, if it is whole and each packed tensor can be unpacked.

    Reads the header and what says where values go (a few bits per entry), no values but int8 ones, and compares no
    digests.

    Raises:
        CAPError: it is damaged.
    """
    with open_safetensors(path) as file:
        names = set(file.keys())
        digests = (file.metadata() or {}).get(DIGESTS)
        packed = packed_names(names)
        shapes = {name: _shape(file, name, path) for name in names}
        found: Counter[str] = Counter()
        dtypes: dict[str, str] = {}
        int8_bytes = 0
        for name in names:
            if name.rpartition(".")[2] not in PARTS:
                dtypes[name] = file.get_slice(name).get_dtype()
                found[dtypes[name]] += math.prod(shapes[name])
        for base, suffixes in packed.items():
            if base in names:
                raise CAPError(f"{path} holds {base} both dense and packed: the file is damaged")
            if SCALES in suffixes:
                parts = {suffix: file.get_tensor(f"{base}.{suffix}") for suffix in suffixes}
                check_int8_parts(parts, f"{base} in {path}")
                int8_bytes += (parts[SHAPE].element_size() - 1) * math.prod(parts[SHAPE].shape[1:])
            else:
                parts = {suffix: _peek(file, f"{base}.{suffix}", path) for suffix in suffixes}
                check_parts(parts, f"{base} in {path}")
            like = SHAPE if SCALES in suffixes else VALUES
            dtypes[base] = file.get_slice(f"{base}.{like}").get_dtype()
            found[dtypes[base]] += math.prod(parts[SHAPE].shape[1:])
    if digests is not None:
        if len(digests) != DIGEST_LENGTH * len(names):
            raise CAPError(f"{path} has not one digest per tensor: the file is damaged")
        places = range(0, len(digests), DIGEST_LENGTH)
        digests = {
            name: digests[first : first + DIGEST_LENGTH] for name, first in zip(sorted(names), places, strict=True)
        }
    dense_bytes = sum(count * _bits(dtype) // 8 for dtype, count in found.items())
    floating = {name: dtype for name, dtype in dtypes.items() if dtype[:1] in ("F", "B") and dtype != "BOOL"}
    return FileContents(names, found.total(), dense_bytes, int8_bytes, floating, digests)


def check_memory(needed: int, path: str | Path) -> None:
    """Raise a CAPError if what a file unpacks to cannot fit into memory.

    Args:
        needed: bytes.
        path: of the file, for the error.
    """
    available = psutil.virtual_memory().available
    if needed > available:
        raise CAPError(
            f"{path} unpacks to {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are free: "
            "free some, or distrust the file"
        )


def load_file(path: str | Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a compressed or plain safetensors file, dense, on the CPU, their digests compared.

    Raises:
        CAPError: the file is damaged, is not a safetensors file, or unpacks to more than the memory that is free.
    """
    contents = check_file(path)
    check_memory(contents.dense_bytes, path)
    with open_safetensors(path) as file:
        stored = {name: file.get_tensor(name) for name in sorted(contents.names)}
        if contents.digests is not None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = list(pool.map(digest, stored, stored.values()))
            wrong = [name for name, each in zip(stored, found, strict=True) if each != contents.digests[name]]
            if wrong:
                raise other_bytes(path, wrong[0])
        tensors = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[2] not in PARTS}
        for base, suffixes in packed_names(stored).items():
            tensors[base] = unpack_any({suffix: stored[f"{base}.{suffix}"] for suffix in suffixes})
    return tensors


def copy_weights(path: Path, destination: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Copy a safetensors file, its metadata changed; its tensors stay as they are, byte for byte.

    Args:
        path: of a file that `check_file` has passed.
        destination: of the copy.
        change: from metadata to metadata.
    """
    with open(path, "rb") as source:
        # Eight bytes of length, the header as JSON, the tensors; blanks fill the header up to whole words.
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        before = header.get("__metadata__") or {}
        after = change(before)
        if after == before:
            shutil.copyfile(path, destination)
            return
        encoded = json.dumps(header | {"__metadata__": after}, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(destination, "wb") as copy:
            copy.write(len(encoded).to_bytes(8, "little") + encoded)
            shutil.copyfileobj(source, copy)


def read_weight(path: str | Path, digests: Mapping[str, str] | None, name: str) -> torch.Tensor:
    """Return a tensor dense, whether it is stored so or packed, its digest compared.

    Args:
        path: of a file that `check_file` has passed.
        digests: that it has, if any.
        name: of the tensor.

    Raises:
        CAPError: the file cannot be read, or holds other bytes than were written.
    """
    with open_safetensors(path) as file:
        parts = [part for part in PARTS if f"{name}.{part}" in file.keys()]  # noqa: SIM118
        stored = {each: file.get_tensor(each) for each in ([f"{name}.{part}" for part in parts] or [name])}
    for each, tensor in stored.items():
        if digests is not None and digest(each, tensor) != digests[each]:
            raise other_bytes(path, each)
    return unpack_any({part: stored[f"{name}.{part}"] for part in parts}) if parts else stored[name]


def other_bytes(path: str | Path, name: str) -> CAPError:
    """Return the error of a tensor whose digest is not that of its bytes."""
    return CAPError(f"{path} holds other bytes in {name} than were written: the file is damaged")


def packed_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the suffixes of the parts among tensor names, by the name of the packed tensor they belong to."""
    packed: dict[str, list[str]] = {}
    for name in sorted(names):
        base, _, suffix = name.rpartition(".")
        if suffix in PARTS:
            packed.setdefault(base, []).append(suffix)
    return packed


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[safe_open]:
    """Open a safetensors file for reading.

    Raises:
        CAPError: it is missing, truncated or something else, or holds what PyTorch cannot read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except CAPError:
        raise
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        if is_pointer(path):
            raise CAPError(
                f"{path} is a pointer of Git LFS and not the file itself: run `git lfs pull` in its folder"
            ) from error
        raise CAPError(
            f"{path} cannot be read as safetensors ({reason(error)}): download it or save it again"
        ) from error


def is_pointer(path: str | Path) -> bool:
    """Return whether a file is what Git LFS keeps in the place of one that it has not fetched."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _shape(file: safe_open, name: str, path: str | Path) -> list[int]:
    """Return the shape of a stored tensor, and refuse one that PyTorch cannot count the entries of."""
    shape = file.get_slice(name).get_shape()
    # Not even where another dimension is 0, as in the shape of a packed tensor.
    if math.prod(max(size, 1) for size in shape) >= 2**63:
        raise CAPError(f"{path} has {name} in the shape {shape}, which no tensor has: the file is damaged")
    return shape


def _bits(dtype: str) -> int:
    """Return the bits of an entry: the dtypes of safetensors have them in their names, as BF16, F8_E4M3, C64."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) if bits else 8  # BOOL


def _peek(file: safe_open, name: str, path: str | Path) -> torch.Tensor:
    """Return a part as it is, except that values are not read: the right shape and size of an entry, nothing in it."""
    if not name.endswith(VALUES):
        return file.get_tensor(name)
    view = file.get_slice(name)
    size, rest = divmod(_bits(view.get_dtype()), 8)
    if rest or size not in INTEGERS:
        raise CAPError(f"{path} has {name} in the dtype {view.get_dtype()}, which is never packed: the file is damaged")
    # An expanded entry has any shape and no bytes of its own.
    return torch.empty((), dtype=INTEGERS[size]).expand(view.get_shape())
