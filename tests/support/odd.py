"""Ways to spoil a checkpoint or a folder of images, as people bring them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, BertConfig, BertModel

from cap_hf import quantize_int8

# Changes the folders `model` and `data` in a folder.
Change = Callable[[Path], object]


def edit_json(name: str, **values: object) -> Change:
    """Set entries of a JSON file of the model; None removes one."""

    def change(work: Path) -> None:
        path = work / "model" / name
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def config(**values: object) -> Change:
    """Set entries of config.json."""
    return edit_json("config.json", **values)


def processor(**values: object) -> Change:
    """Set entries of preprocessor_config.json."""
    return edit_json("preprocessor_config.json", **values)


def write(name: str, content: bytes) -> Change:
    """Write a file of the model."""
    return lambda work: (work / "model" / name).write_bytes(content)


def remove(name: str) -> Change:
    """Remove a file or a folder."""

    def change(work: Path) -> None:
        path = work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut(name: str) -> Change:
    """Keep the first half of a file of the model."""

    def change(work: Path) -> None:
        path = work / "model" / name
        os.truncate(path, path.stat().st_size // 2)

    return change


def prefixed(prefix: str) -> Change:
    """Put something before the name of every weight."""

    def change(work: Path) -> None:
        path = work / "model" / "model.safetensors"
        save_file({prefix + name: value for name, value in load_file(path).items()}, path, {"format": "pt"})

    return change


def pickled(name: str) -> Change:
    """Have the weights in a file that is unpickled, and not as safetensors."""

    def change(work: Path) -> None:
        path = work / "model" / "model.safetensors"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()

    return change


def adapter(work: Path) -> None:
    """Put a LoRA adapter beside the weights."""
    content = {"peft_type": "LORA", "base_model_name_or_path": "someone/vit"}
    (work / "model" / "adapter_config.json").write_text(json.dumps(content))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, work / "model" / "adapter_model.safetensors")


def quantised(work: Path) -> None:
    """Save the model with int8 weights."""
    processor = AutoImageProcessor.from_pretrained(work / "model")
    model = quantize_int8(AutoModelForImageClassification.from_pretrained(work / "model"))
    model.save_pretrained(work / "model")
    processor.save_pretrained(work / "model")


def whole_numbers(work: Path) -> None:
    """Store the weights as int8 and say nothing of it."""
    path = work / "model" / "model.safetensors"
    save_file({name: value.mul(99).to(torch.int8) for name, value in load_file(path).items()}, path, {"format": "pt"})


def text_model(work: Path) -> None:
    """Have a model that reads text in the model's place."""
    BertModel(
        BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    ).save_pretrained(work / "model")


def broken_weight(value: float) -> Change:
    """Put a value into a weight."""

    def change(work: Path) -> None:
        path = work / "model" / "model.safetensors"
        weights = load_file(path)
        next(tensor for name, tensor in sorted(weights.items()) if "query" in name and tensor.dim() == 2)[0, 0] = value
        save_file(weights, path, {"format": "pt"})

    return change


def damaged_picture(work: Path) -> None:
    """Cut every picture off."""
    for path in sorted((work / "data").rglob("*.png")):
        path.write_bytes(path.read_bytes()[:40])


def pictures(folder: Path, classes: tuple[str, ...], splits: tuple[str, ...] = ("train", "test")) -> None:
    """Write two pictures of each class and split, 8x8 and 9x8."""
    for split in splits:
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(2):
                grey = 20 * number + index
                Image.new("RGB", (8 + index, 8), (grey, grey, grey)).save(folder / split / name / f"{index}.png")


def painted(mode: str, value: float, suffix: str) -> Change:
    """Have pictures of another mode, all of one value."""

    def change(work: Path) -> None:
        for path in sorted((work / "data").rglob("*.png")):
            Image.new(mode, (8, 8), value).save(path.with_suffix(suffix))
            if suffix != ".png":
                path.unlink()

    return change


def unlabelled_test(work: Path) -> None:
    """Have the pictures of test/ without folders of classes."""
    for path in sorted((work / "data" / "test").rglob("*.png")):
        path.rename(work / "data" / "test" / f"{path.parent.name}-{path.name}")
    for path in [path for path in (work / "data" / "test").iterdir() if path.is_dir()]:
        path.rmdir()


def two_configurations(work: Path) -> None:
    """Have a dataset of two configurations."""
    entry = (
        "- config_name: {}\n  data_files:\n  - {{split: train, path: train/**}}\n  - {{split: test, path: test/**}}\n"
    )
    text = f"---\nconfigs:\n{entry.format('small')}{entry.format('large')}---\n"
    (work / "data" / "README.md").write_text(text)


def two_splits_in_one(work: Path) -> None:
    """Have one folder that is called like two splits."""
    shutil.rmtree(work / "data" / "test")
    (work / "data" / "train").rename(work / "data" / "train_test")


def nothing(work: Path) -> None:
    """Leave everything as it is: the arguments are odd."""


def is_file(name: str) -> Change:
    """Have a file in the place of a folder."""

    def change(work: Path) -> None:
        if (work / name).is_dir():
            shutil.rmtree(work / name)
        (work / name).write_text("a file")

    return change


def below_file(name: str) -> Change:
    """Have a link to what would lie below a file."""

    def change(work: Path) -> None:
        (work / "file").write_text("a file")
        (work / name).symlink_to("file/below")

    return change


def link(name: str, target: str) -> Change:
    """Make a link."""
    return lambda work: (work / name).symlink_to(target)


def classes(*names: str) -> Change:
    """Have other classes in the data."""

    def change(work: Path) -> None:
        shutil.rmtree(work / "data")
        pictures(work / "data", names)

    return change
