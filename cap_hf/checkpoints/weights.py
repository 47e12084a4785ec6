"""The weight files of a checkpoint folder: where they are, how large, and their compressed form."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from cap_hf.checkpoints.compression import VALUES, digest_names, load_file, open_safetensors, pack
from cap_hf.checkpoints.location import check_location
from cap_hf.checkpoints.quantizer import (
    COMPRESSED_INDEX_NAME,
    COMPRESSED_NAME,
    FORMAT_VERSION,
    IMPORT_HINT,
    QUANT_METHOD,
)
from cap_hf.errors import CAPError, reason

PLAIN_NAME, PLAIN_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
# What a compressed tensor's entries in a file's header take, at most.
HEADER_BYTES = 512


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a checkpoint, in order."""

    paths: list[Path]
    compressed: bool

    @property
    def num_bytes(self) -> int:
        """What they take on the disk."""
        return sum(path.stat().st_size for path in self.paths)


def find_weight_files(folder: str | Path) -> WeightFiles:
    """The weights that `from_pretrained` would load from a folder.

    Raises:
        CAPError: there are none as safetensors, or an index names a file that is not there.
    """
    folder = Path(folder)
    for name, index, compressed in (
        (COMPRESSED_NAME, COMPRESSED_INDEX_NAME, True),
        (PLAIN_NAME, PLAIN_INDEX_NAME, False),
    ):
        if (folder / name).is_file():
            return WeightFiles([folder / name], compressed)
        if (folder / index).is_file():
            try:
                names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CAPError(f"{folder / index} is no index of safetensors files") from error
            for shard in names:
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise CAPError(f"{folder / index} names {shard!r}, which is not in {folder}")
            return WeightFiles([folder / shard for shard in names], compressed)
    raise CAPError(f"{folder} has no {PLAIN_NAME}: a checkpoint with safetensors weights is needed")


def local_folder(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None, token: str | None = None
) -> Path:
    """A folder as it is, or a Hub checkpoint downloaded into the cache.

    Raises:
        CAPError: there is no such folder and no such checkpoint within reach.
    """
    check_location(name_or_path)
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        folder = snapshot_download(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=["*.json", "*.safetensors", "*.py", "*.txt", "*.md", "*.png"],
        )
    except Exception as error:  # network, rights, a name that is none
        raise CAPError(f"{name_or_path} is no folder and cannot be downloaded: {reason(error)}") from error
    return Path(folder)


def iterate_weights(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a checkpoint, dense, in the dtype it is stored in, one file in memory at a time.

    Raises:
        CAPError: as `find_weight_files`; or a file is damaged.
    """
    for path in find_weight_files(folder).paths:
        yield from load_file(path).items()


def compress_weights(source: Path, destination: Path) -> None:
    """Write the weights of a plain checkpoint into a folder in compressed form, with a config.json to load them.

    In the same folder the plain files are removed. Tensors that would not become smaller stay dense.

    Args:
        source: a folder with config.json and plain safetensors weights, in one file or several.
        destination: the same, or another that exists.

    Raises:
        CAPError: the checkpoint is compressed or quantized already, or a file is damaged.
    """
    files = find_weight_files(source)
    config = _read_config(source)
    if files.compressed:
        raise CAPError(f"{source} is compressed already")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "something else")
        raise CAPError(f"{source} is quantized with {method}: only a plain checkpoint can be compressed")
    stem, suffix = COMPRESSED_NAME.split(".safetensors")[0], ".safetensors"
    weight_map, total = {}, 0
    for number, path in enumerate(files.paths, 1):
        tensors = {}
        with open_safetensors(path) as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            for parts in pool.map(lambda name, file=file: _packed(name, file.get_tensor(name)), sorted(file.keys())):
                tensors.update(parts)
        name = COMPRESSED_NAME
        if len(files.paths) > 1:
            name = f"{stem}-{number:05d}-of-{len(files.paths):05d}{suffix}"
        save_file(tensors, destination / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weights_file = COMPRESSED_NAME
    if len(files.paths) > 1:
        weights_file = COMPRESSED_INDEX_NAME
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (destination / weights_file).write_text(json.dumps(index, indent=2) + "\n")
    config["transformers_weights"] = IMPORT_HINT
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "weights_file": weights_file,
        "names_digest": digest_names(weight_map),
    }
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if source == destination:
        for path in (*files.paths, source / PLAIN_INDEX_NAME):
            path.unlink(missing_ok=True)


def _packed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor as it is stored: in parts if that is smaller, else whole."""
    # transformers' hook puts weights together; a vector is not worth its header.
    parts = pack(tensor) if name.endswith(".weight") and tensor.dim() > 1 else None
    if parts is None or _num_bytes(parts) + HEADER_BYTES >= tensor.numel() * tensor.element_size():
        return {name: tensor}
    return {f"{name}.{suffix}": part for suffix, part in parts.items()}


def count_negative_zeros(folder: str | Path) -> int:
    """How many values of a compressed checkpoint's packed weights are -0.0, kept because their sign is a bit too.

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


def measure(folder: str | Path) -> tuple[int, int]:
    """Bytes of a checkpoint's tensors: dense, and as `compress_weights` would store them.

    Raises:
        CAPError: as `iterate_weights`.
    """
    dense = compressed = 0
    for name, tensor in iterate_weights(folder):
        dense += tensor.numel() * tensor.element_size()
        compressed += _num_bytes(_packed(name, tensor))
    return dense, compressed


def _num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CAPError(f"{folder} has no readable config.json: {error}") from error
