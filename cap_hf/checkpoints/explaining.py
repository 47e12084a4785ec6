"""What is wrong with a checkpoint that cannot be loaded: one line that says what to do."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn

from cap_hf.checkpoints.files import check_file
from cap_hf.checkpoints.folder import MODEL_CONFIG_NAME, PROCESSOR_NAME, read_json
from cap_hf.errors import CAPError, reason
from cap_hf.targets import summarize

# Where an image processor may be described: in a file of its own, or in that of several towers.
PROCESSOR_NAMES = (PROCESSOR_NAME, "processor_config.json")
ADAPTER_CONFIG_NAME = "adapter_config.json"
# What is unpickled, or is of another framework.
FOREIGN_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")
# What may be lacking and is called as what installs it. A name that is not here may be a module of the checkpoint's own
# code: nobody is told to install whatever has that name.
PACKAGES = (
    *("accelerate", "autoawq", "bitsandbytes", "compressed-tensors", "einops", "gptqmodel", "hqq", "kornia", "optimum"),
    *("peft", "scipy", "sentencepiece", "torchvision", "vptq"),
)
# The same, by the name that it is imported by, and what to install.
INSTALLED_AS = {
    "timm": "'cap_hf[timm]'",
    "torchao": "'cap_hf[quantization]'",
    "PIL": "pillow",
    "cv2": "opencv-python",
    "sklearn": "scikit-learn",
    "auto_gptq": "gptqmodel",
    "awq": "autoawq",
    "compressed_tensors": "compressed-tensors",
    "quanto": "optimum-quanto",
}
LACKING = re.compile(r"requires?\b|missing|not found|not installed|no module named|too old|pip install", re.IGNORECASE)
# Who leaves a prefix before the name of every weight, and what to save instead.
WRAPPERS = {
    "_orig_mod.": ("torch.compile", "save model._orig_mod"),
    "module.": ("DataParallel or DDP", "save model.module"),
    "base_model.model.": ("PEFT", "save model.merge_and_unload()"),
}
ANY_WRAPPER = ("a class around the model, such as a Lightning module,", "save the model inside")


def explain(name_or_path: str | Path, error: Exception) -> str:
    """Return one line about a checkpoint that could not be loaded.

    Args:
        name_or_path: a Hub id, or a folder.
        error: what was raised.
    """
    said, folder = reason(error), Path(name_or_path)
    if "trust_remote_code=True" in said:
        return f"{folder} brings code of its own along: read it, and pass --trust_remote_code true if it may run"
    if found := re.search(r"model type [`'\"](.+?)[`'\"]", said):
        return (
            f"{folder} is a {found[1]!r}, which this version of transformers does not know: upgrade it, or pass "
            "--trust_remote_code true if the checkpoint brings its code along"
        )
    if package := missing_package(said):
        return f"{folder} needs a package that is not installed, or too old: pip install -U {package}"
    if "model.safetensors" in said and re.search(r"[Nn]o file named|not appear to have a file", said):
        return explain_format(folder)
    try:
        # What is damaged is named as every command names it.
        if folder.is_dir():
            stated = read_json(folder / MODEL_CONFIG_NAME).get("quantization_config")
            if stated is not None and not (isinstance(stated, dict) and "quant_method" in stated):
                return (
                    f"{folder} has a quantization_config without a quant_method in its config.json: remove it, if the "
                    "weights are floats"
                )
        for path in sorted(folder.glob("*.safetensors")):
            check_file(path)
    except CAPError as damage:
        return str(damage)
    return f"{folder} cannot be loaded: {said}"


def explain_processor(name_or_path: str | Path, error: Exception) -> str:
    """Return one line about an image processor that could not be loaded.

    Args:
        name_or_path: a Hub id, or a folder.
        error: what was raised.
    """
    said, folder = reason(error), Path(name_or_path)
    if "trust_remote_code=True" in said:
        return explain(name_or_path, error)
    if package := missing_package(said):
        return f"the image processor of {folder} needs a package that is not installed: pip install {package}"
    if folder.is_dir() and not any((folder / name).is_file() for name in PROCESSOR_NAMES):
        return (
            f"{folder} has no image processor: save that of the model it was trained from there, "
            "AutoImageProcessor.from_pretrained(...).save_pretrained(folder)"
        )
    if "Unrecognized image processor" in said:
        return f"{folder} has an image processor that transformers does not know: correct its {PROCESSOR_NAME}"
    return f"the image processor of {folder} cannot be loaded: {said}"


def explain_adapter(name_or_path: str | Path) -> str:
    """Return one line about a checkpoint that is an adapter, or has one beside its weights."""
    return (
        f"{name_or_path} has an adapter ({ADAPTER_CONFIG_NAME}), which is no whole model: load it with PEFT, save "
        "model.merge_and_unload() with its image processor, and name that folder"
    )


def explain_format(folder: Path) -> str:
    """Return one line about a checkpoint without safetensors."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return explain_adapter(folder)
    found = sorted(path.name for pattern in FOREIGN_WEIGHTS for path in folder.glob(pattern))
    if folder.is_dir() and not found:
        return f"{folder} has no weights: there is no model.safetensors"
    if folder.is_dir():
        return (
            f"{folder} has its weights in {summarize(found, 3)}: only safetensors are read, as unpickling a file "
            "runs what is in it; if you trust it, load it with transformers and `save_pretrained` it once"
        )
    return (
        f"{folder} has no weights as safetensors: only these are read; --model_revision refs/pr/1 has them where the "
        "Hub's converter made some, else load it with transformers, if you trust it, and `save_pretrained` it once"
    )


def explain_missing(
    name_or_path: str | Path, model: nn.Module, missing: Collection[str], unexpected: Collection[str]
) -> str:
    """Return one line about weights that a model needs and a checkpoint does not have, at least under these names."""
    if prefix := prefix_of(missing, unexpected):
        wrapper, advice = WRAPPERS.get(prefix, ANY_WRAPPER)
        return (
            f"the names of {name_or_path}'s weights begin with {prefix!r}, which {wrapper} puts there: {advice}, or "
            "take the prefix off"
        )
    return (
        f"{name_or_path} has no weights for {summarize(sorted(missing), 3)} of a {type(model).__name__}: "
        f'name the class that its weights are of under "architectures" in its config.json, or train what is '
        "missing"
    )


def explain_mismatch(
    name_or_path: str | Path, model: nn.Module, mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]]
) -> str:
    """Return one line about weights of other shapes than the config asks for.

    Args:
        name_or_path: the checkpoint.
        model: that its config asks for.
        mismatched: per weight its name, its shape in the checkpoint, and in the model.
    """
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    names = sorted(name for name, *_ in mismatched)
    heads = {tuple(stored)[:1] for _, stored, asked in mismatched if tuple(asked)[:1] == (labels,)}
    if len(heads) == 1 and all(tuple(asked)[:1] == (labels,) for _, _, asked in mismatched):
        return (
            f"{name_or_path} has a head of {max(heads)[0]} classes ({summarize(names, 2)}), and its "
            f"config.json has {labels} (id2label): correct that file, or finetune a new head first"
        )
    shapes = [f"{name} {tuple(stored)} and not {tuple(asked)}" for name, stored, asked in sorted(mismatched)]
    return (
        f"{name_or_path} has weights of another shape than its config.json asks for, so these two are of "
        f"different models: {summarize(shapes, 3)}"
    )


def prefix_of(missing: Collection[str], unexpected: Collection[str]) -> str:
    """Return what a file has before the name of every weight that is missing; "" where that is not all it is."""
    first = min(missing, default="")
    for name in sorted(unexpected):
        prefix = name.removesuffix(first)
        if first and prefix != name and prefix.endswith(".") and all(prefix + each in unexpected for each in missing):
            return prefix
    return ""


def missing_package(said: str) -> str | None:
    """Return what to install, where a library says that it needs a package that is known here."""
    if not LACKING.search(said):
        return None
    known = {name: name for name in PACKAGES} | INSTALLED_AS
    named = [name for name in known if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", said, re.IGNORECASE)]
    return " ".join(dict.fromkeys(known[name] for name in named)) or None
