"""Write weights in compressed form: of a checkpoint's files, or of tensors as they come; bit for bit or in int8."""

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from cap_hf.checkpoints.atomic import atomic_directory, write_json
from cap_hf.checkpoints.compression import (
    COMPRESSED_INDEX_NAME,
    COMPRESSED_NAME,
    FORMAT_VERSION,
    IMPORT_HINT,
    INT8_FORMAT_VERSION,
    QUANT_METHOD,
    SCALES,
)
from cap_hf.checkpoints.files import check_file, digest_names, packed_names, read_weight, save_file
from cap_hf.checkpoints.folder import MODEL_CONFIG_NAME, check_inside, copy_file, read_json
from cap_hf.checkpoints.int8 import LEAST_PRUNED
from cap_hf.checkpoints.loading import check_folder, load_checkpoint
from cap_hf.checkpoints.weights import count_bytes, find_weight_files, to_stored
from cap_hf.errors import CAPError

# Weights in any format: a copy of a checkpoint in another form leaves them behind.
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".h5", ".msgpack", ".onnx")

# What one weight file is written from: the names of its tensors and how to get one, which several threads do.
Shard = tuple[Sequence[str], Callable[[str], torch.Tensor]]


def int8_names(model: PreTrainedModel) -> set[str]:
    """Return the names that the weights of a model's Linear layers are saved under: those that may become int8.

    Left out are subclasses, which may compute something else, and weights that the class ties to others.

    Args:
        model: on any device, the meta device too.
    """
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    linears = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear} - tied
    # transformers renames, joins and splits weights when it saves them, and tells nobody; a dtype goes with each.
    marked = {
        name: torch.empty_like(tensor, dtype=torch.int8 if name in linears else torch.bool, device="meta")
        for name, tensor in model.state_dict().items()
    }
    return {name for name, tensor in revert_weight_conversion(model, marked).items() if tensor.dtype == torch.int8}


def compress_checkpoint(
    source: str | Path, directory: str | Path, int8: bool = False, trust_remote_code: bool = False
) -> None:
    """Write a compressed copy of a checkpoint, atomically; another checkpoint there is replaced.

    Args:
        source: a folder with a plain checkpoint, or for int8 a compressed one too; everything beside its weights is
            copied.
        directory: where to.
        int8: round the sparse weights of Linear layers to int8, with a scale per row.
        trust_remote_code: run the code that the checkpoint brings along, which int8 has to, to know its layers.

    Raises:
        CAPError: the source cannot be compressed, a file of it is a link out of it or is called JSON and is none, the
            disk is full, or the folder cannot be written or holds something else than a checkpoint. For int8: it cannot
            be loaded, no weight is sparse, or one is not finite.
    """
    source = Path(source)
    names: set[str] | None = None
    if int8:
        check_folder(source, trust_remote_code)
        names = int8_names(load_checkpoint(source, trust_remote_code, device_map="meta"))
    with atomic_directory(directory, source) as folder:
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
                copy_file(path, source, folder)
        compress_weights(source, folder, names)


def compress_weights(source: Path, destination: Path, int8: Collection[str] | None = None) -> None:
    """Write the weights of a checkpoint into another folder in compressed form, with a config.json to load them.

    Args:
        source: a folder with config.json and safetensors weights, in one file or several.
        destination: that exists.
        int8: as of `write_compressed`; where it is given, the checkpoint may be compressed bit for bit.

    Raises:
        CAPError: the checkpoint is compressed or quantized already, or a file is damaged or a link out of its folder;
            as of `write_compressed`.
    """
    files, config = find_weight_files(source), read_json(source / MODEL_CONFIG_NAME)
    if files.compressed:
        if files.have_int8:
            raise CAPError(f"{source} is compressed in int8 already")
        if int8 is None:
            raise CAPError(f"{source} is compressed already")
        config = {
            key: value for key, value in config.items() if key not in ("quantization_config", "transformers_weights")
        }
    shards: list[Shard] = []
    for path in files.paths:
        check_inside(path, source)
        contents = check_file(path)
        packed = packed_names(contents.names)
        names = {name for name in contents.names if name.rpartition(".")[0] not in packed} | set(packed)
        # Opened for each tensor: what goes wrong in between is about the file that is written.
        shards.append((sorted(names), partial(read_weight, path, contents.digests)))
    write_compressed(shards, config, destination, source, int8)


def write_compressed(
    shards: Sequence[Shard], config: dict, folder: Path, name: str | Path, int8: Collection[str] | None = None
) -> None:
    """Write compressed weights and the config.json that makes `from_pretrained` load them.

    Tensors that would not become smaller stay dense.

    Args:
        shards: of the weights, one for each file.
        config: what config.json holds of a plain checkpoint.
        folder: that exists.
        name: of what is compressed, for the error.
        int8: names of the weights that are rounded, if they are sparse; None to store all bit for bit.

    Raises:
        CAPError: the weights are quantised; of those to be rounded none is sparse, or one is not finite.
    """
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CAPError(
            f"{name} is quantised{f' with {method}' if method else ''}: compress the checkpoint in floats that it was "
            "made from"
        )
    stem = COMPRESSED_NAME.removesuffix(".safetensors")
    weight_map, total, rounded = {}, 0, int8 or ()
    for number, (names, read) in enumerate(shards, 1):
        tensors: dict[str, torch.Tensor] = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for stored in pool.map(lambda name, read=read: to_stored(name, read(name), name in rounded), sorted(names)):
                tensors.update(stored)
        file_name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else COMPRESSED_NAME
        save_file(tensors, folder / file_name)
        weight_map.update(dict.fromkeys(tensors, file_name))
        total += count_bytes(tensors)
    if int8 is not None and not any(stored.endswith(f".{SCALES}") for stored in weight_map):
        if int8 and not any(each in int8 for names, _ in shards for each in names):
            raise CAPError(
                f"{name} has nothing to store in int8 that is known to be a Linear layer's: its weights have other "
                f"names than those of the class that {MODEL_CONFIG_NAME} names; name there, in architectures, the "
                "class that saved them"
            )
        raise CAPError(
            f"{name} has nothing to store in int8: no Linear layer is {100 * LEAST_PRUNED:.0f} % zeros and large "
            "enough to gain; prune it first"
        )
    if len(shards) > 1:
        write_json(folder / COMPRESSED_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = config | {
        "transformers_weights": IMPORT_HINT,
        "quantization_config": {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION if int8 is None else INT8_FORMAT_VERSION,
            "weights_file": COMPRESSED_INDEX_NAME if len(shards) > 1 else COMPRESSED_NAME,
            "names_digest": digest_names(weight_map),
        },
    }
    write_json(folder / MODEL_CONFIG_NAME, config)
