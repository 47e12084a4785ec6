"""Make a plain checkpoint of one that another library's pruning has written: packed or with masks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cap_hf.checkpoints.atomic import atomic_directory, write_json
from cap_hf.checkpoints.compressing import WEIGHT_SUFFIXES
from cap_hf.checkpoints.explaining import FOREIGN_WEIGHTS, explain
from cap_hf.checkpoints.files import check_memory, open_safetensors, save_file
from cap_hf.checkpoints.folder import MODEL_CONFIG_NAME, check_inside, check_model_config, copy_file, read_json, shorten
from cap_hf.checkpoints.foreign import (
    MASK,
    ORIGINAL,
    QUANTISED,
    VALUES,
    Header,
    check_headers,
    dense_bytes,
    find_parts,
    join,
)
from cap_hf.checkpoints.loading import build_empty, load_checkpoint
from cap_hf.checkpoints.places import check_space
from cap_hf.checkpoints.quantized import NOT_REAL
from cap_hf.checkpoints.weights import PLAIN_INDEX_NAME, WeightFiles, count_bytes, find_weight_files
from cap_hf.errors import CAPError
from cap_hf.targets import summarize
from cap_hf.towers import tower_name

# In config.json: where compressed-tensors, and SparseML before it, say how the weights are stored.
SECTIONS = ("quantization_config", "compression_config")
SPARSITY = "sparsity_config"
METHODS = (None, "compressed-tensors", "sparseml")
# Formats in which weights are floats.
FORMATS = ("dense", "sparse-bitmask", "sparse-24-bitmask")


@dataclass(frozen=True)
class Converted:
    """What a conversion has found.

    Attributes:
        num_packed: weights that were stored by compressed-tensors in parts.
        num_masked: weights and biases that were stored with a mask, by torch.nn.utils.prune or NNCF.
        sections: of config.json that were taken out.
    """

    num_packed: int
    num_masked: int
    sections: tuple[str, ...]


def convert_checkpoint(source: str | Path, directory: str | Path, trust_remote_code: bool = False) -> Converted:
    """Write a plain copy of a checkpoint, atomically; another checkpoint there is replaced.

    Dtypes stay, and which file a weight is in; a zero becomes +0.0. What lies beside the weights is copied.

    Args:
        source: a folder with weights as safetensors, in parts of compressed-tensors, with masks of
            torch.nn.utils.prune or NNCF, or whole with zeros.
        directory: where to.
        trust_remote_code: run the code that the checkpoint brings along, which its class may be in.

    Raises:
        CAPError: the weights are in another format or quantised, a part is missing or does not fit, it is no vision
            model or lacks weights, the disk or memory is too small, or the folder cannot be written.
    """
    source = Path(source)
    files = find_safetensors(source)
    config, sections = clean_config(read_json(source / MODEL_CONFIG_NAME), source)
    places, headers = read_headers(source, files)
    packed = find_parts(headers)
    check_model_config(source, len(headers))
    for name, parts in packed.items():
        check_headers(name, {part: headers[stored] for part, stored in parts.items()})
    check_floats(source, headers, {stored for parts in packed.values() for stored in parts.values()})
    check_vision(source, trust_remote_code)
    with atomic_directory(directory, source) as folder:
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
                copy_file(path, source, folder)
        write_json(folder / MODEL_CONFIG_NAME, config)
        write_weights(files, folder, places, headers, packed)
        try:
            # What any command would find wrong with it is found before it is there.
            load_checkpoint(folder, trust_remote_code)
        except CAPError as error:
            raise CAPError(str(error).replace(str(folder), str(source))) from error
    masked = sum(MASK in parts for parts in packed.values())
    return Converted(len(packed) - masked, masked, sections)


def find_safetensors(folder: Path) -> WeightFiles:
    """Return the weight files of a checkpoint that is not cap_hf's own compressed one.

    Raises:
        CAPError: it is one, or has no safetensors.
    """
    safe = [path for path in folder.glob("*.safetensors") if path.is_file()]
    pickled = sorted(path.name for pattern in FOREIGN_WEIGHTS for path in folder.glob(pattern))
    if pickled and not safe:
        raise CAPError(
            f"{folder} has its weights in {summarize(pickled, 3)}: only safetensors are read, as unpickling a file "
            "runs what is in it; if you trust it, write its state dict once with safetensors.torch.save_file, as "
            "model.safetensors"
        )
    files = find_weight_files(folder)
    if files.compressed:
        raise CAPError(f"{folder} is compressed by cap_hf, and every command takes it as it is")
    return files


def clean_config(config: dict, folder: Path) -> tuple[dict, tuple[str, ...]]:
    """Return a config.json without what other libraries say of sparsity in it, and the sections that were taken out.

    Raises:
        CAPError: it says that weights are quantised, transformed, or in a format that is not known.
    """
    found = [config[key] for key in SECTIONS if config.get(key)]
    for section in found:
        if not isinstance(section, dict):
            raise CAPError(f"{folder / MODEL_CONFIG_NAME} has no names and values in its quantization_config")
        method, kind = section.get("quant_method"), section.get("format")
        if method not in METHODS or section.get("config_groups") or kind not in (None, *FORMATS):
            how = method if method not in METHODS else kind or "compressed-tensors"
            raise CAPError(
                f"{folder} is quantised ({shorten(str(how))}), which this command does not undo: convert the "
                "checkpoint in floats that it was made from"
            )
        transforms = section.get("transform_config")
        if isinstance(transforms, dict) and any(transforms.values()):
            raise CAPError(
                f"{folder} has transformed weights (transform_config), which are not those of the model: convert the "
                "checkpoint that was not transformed"
            )
    for sparsity in [config.get(SPARSITY), *(section.get(SPARSITY) for section in found)]:
        kind = sparsity.get("format") if isinstance(sparsity, dict) else None
        if kind not in (None, *FORMATS):
            raise CAPError(
                f"{folder} has its weights in the format {shorten(repr(kind))}, and known are {', '.join(FORMATS)}"
            )
    gone = tuple(key for key in (*SECTIONS, SPARSITY) if key in config)
    return {key: value for key, value in config.items() if key not in gone}, gone


def read_headers(folder: Path, files: WeightFiles) -> tuple[dict[str, Path], dict[str, Header]]:
    """Return the file, and the shape and dtype, of each tensor of a checkpoint.

    Raises:
        CAPError: a file cannot be read, is a link out of its folder, or holds a tensor that another one holds as well.
    """
    places: dict[str, Path] = {}
    headers: dict[str, Header] = {}
    for path in files.paths:
        check_inside(path, folder)
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in places:
                    raise CAPError(f"{name} is in {places[name].name} and in {path.name}: remove one of the two")
                view = file.get_slice(name)
                places[name], headers[name] = path, (tuple(view.get_shape()), view.get_dtype())
    return places, headers


def check_floats(folder: Path, headers: Mapping[str, Header], parts: set[str]) -> None:
    """Raise a CAPError if a weight that is stored whole is quantised, whatever config.json says."""
    for name, (shape, dtype) in headers.items():
        integer = name.endswith(".weight") and len(shape) > 1 and (dtype in NOT_REAL or dtype.startswith("F8"))
        if name not in parts and (integer or name.rpartition(".")[2] in QUANTISED):
            raise CAPError(
                f"{folder} is quantised ({name} in {dtype}), which this command does not undo: convert the checkpoint "
                "in floats that it was made from"
            )


def check_vision(folder: Path, trust_remote_code: bool) -> None:
    """Raise a CAPError if a checkpoint's model takes no images, or cannot be built."""
    try:
        model = build_empty(folder, trust_remote_code)
    except Exception as error:  # configuration, foreign code
        raise CAPError(explain(folder, error)) from error
    tower_name(model)


def write_weights(
    files: WeightFiles,
    folder: Path,
    places: Mapping[str, Path],
    headers: Mapping[str, Header],
    packed: Mapping[str, Mapping[str, str]],
) -> None:
    """Write the weights of a checkpoint into another folder, whole, in files of the same names.

    Args:
        files: of the checkpoint.
        folder: that exists.
        places: the file of each stored tensor. The parts of one weight may lie in several.
        headers: of each stored tensor.
        packed: the weights that are stored in parts, see `find_parts`.

    Raises:
        CAPError: parts contradict each other, or there is too little memory or disk.
    """
    stored = {name for parts in packed.values() for name in parts.values()}
    contents: dict[Path, dict[str, Mapping[str, str]]] = {path: {} for path in files.paths}
    for name in headers.keys() - stored:
        contents[places[name]][name] = {}
    for name, parts in packed.items():
        contents[places[parts[VALUES if VALUES in parts else ORIGINAL]]][name] = parts
    weight_map: dict[str, str] = {}
    total = 0
    for path, weights in contents.items():
        if not weights:
            continue  # it held nothing but masks
        needed = sum(
            dense_bytes({part: headers[each] for part, each in (parts or {name: name}).items()})
            for name, parts in weights.items()
        )
        check_memory(needed, path)
        check_space(folder, needed)
        tensors = {name: read_whole(name, parts, places) for name, parts in sorted(weights.items())}
        save_file(tensors, folder / path.name)
        weight_map.update(dict.fromkeys(tensors, path.name))
        total += count_bytes(tensors)
    if files.index is not None:
        write_json(folder / PLAIN_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def read_whole(name: str, parts: Mapping[str, str], places: Mapping[str, Path]) -> torch.Tensor:
    """Return a tensor of a checkpoint, dense; a zero of a weight is +0.0.

    Args:
        name: of the tensor.
        parts: the stored name of each of its parts; none if it is stored whole.
        places: the file of each stored tensor.
    """
    read = {part: read_tensor(places[stored], stored) for part, stored in (parts or {"": name}).items()}
    tensor = join(name, read) if parts else read[""]
    if name.endswith(".weight") and tensor.is_floating_point():
        # A mask that was multiplied with leaves -0.0, which a compressed checkpoint would store like a value.
        tensor = tensor.masked_fill(tensor == 0, 0.0)
    return tensor


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Return a stored tensor of a file."""
    with open_safetensors(path) as file:
        return file.get_tensor(name)
