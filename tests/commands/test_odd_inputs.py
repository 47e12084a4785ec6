"""Every command on what people bring: one line that names the thing, no traceback, nothing left behind.

A new input is a line in `ODD`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.checkpoints import make_model, make_processor
from support.odd import (
    Change,
    adapter,
    broken_weight,
    classes,
    config,
    cut,
    damaged_picture,
    pickled,
    pictures,
    prefixed,
    processor,
    remove,
    write,
)

from cap_hf.commands.main import main

QUIET = ["--disable_tqdm", "true"]
DATA = ["--dataset_name", "data", *QUIET]
ARGUMENTS = {
    "prune": [*DATA, "--sparsity", "0.5", "--num_grads", "6"],
    "evaluate": DATA,
    "finetune": [*DATA, "--max_steps", "1", "--use_cpu", "true", "--report_to", "none"],
    "inspect": [],
    "benchmark": [*QUIET, "--runs", "3", "--batch_sizes", "1", "--backends", "dense"],
    "compress": [],
    "push": ["--hub_model_id", "someone/sparse", "--dry_run", "true"],
}
EVERY = tuple(ARGUMENTS)
# What builds the model; compress copies a checkpoint that it need not understand.
LOADING = tuple(name for name in EVERY if name != "compress")
# What reads pictures.
READING = ("prune", "evaluate", "finetune")


@dataclass(frozen=True)
class Odd:
    """An input that cannot be used: how it is made, who meets it, and what their line says (a regular expression)."""

    change: Change
    commands: tuple[str, ...]
    words: str


ODD = {
    # Folders that are no checkpoint.
    "no folder": Odd(remove("model"), EVERY, r"model is no folder|model.* cannot be (loaded|downloaded)"),
    "no config": Odd(remove("model/config.json"), EVERY, r"model/config\.json is not there"),
    "config cut off": Odd(cut("config.json"), EVERY, r"model/config\.json cannot be read: "),
    "config is a list": Odd(write("config.json", b"[1]"), EVERY, r"model/config\.json holds no JSON object"),
    "no weights": Odd(
        remove("model/model.safetensors"), EVERY, r"model has no weights: there is no model\.safetensors"
    ),
    "pickled weights": Odd(
        pickled("pytorch_model.bin"), EVERY, r"model has its weights in pytorch_model\.bin: only saf"
    ),
    "a checkpoint of Lightning": Odd(pickled("last.ckpt"), EVERY, r"model has its weights in last\.ckpt: only safete"),
    "weights cut off": Odd(cut("model.safetensors"), EVERY, r"model/model\.safetensors cannot be read as safetensors"),
    "a pointer of Git LFS": Odd(
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        EVERY,
        r"model/model\.safetensors is a pointer of Git LFS .*git lfs pull",
    ),
    # Checkpoints of something else.
    "names of torch.compile": Odd(
        prefixed("_orig_mod."), LOADING, r"model's .* begin with '_orig_mod\.', which torch.c"
    ),
    "names of DataParallel": Odd(prefixed("module."), LOADING, r"model's .* begin with 'module\.', which DataParallel"),
    "names of Lightning": Odd(prefixed("model."), LOADING, r"model's .* begin with 'model\.', .* Lightning"),
    "an adapter": Odd(adapter, LOADING, r"model has an adapter .*merge_and_unload\(\)"),
    "a type of tomorrow": Odd(config(model_type="vit9"), LOADING, r"model is a 'vit9', which this version of transfor"),
    "a head of another size": Odd(
        config(id2label={str(i): f"c{i}" for i in range(5)}, label2id={f"c{i}": i for i in range(5)}),
        LOADING,
        r"model has a head of 3 classes \(classifier\.bias, classifier\.weight\), and its config\.json has 5",
    ),
    "another width": Odd(config(intermediate_size=32), LOADING, r"model has weights of another shape .* and not \(32"),
    "a number as text": Odd(config(hidden_size="48"), LOADING, r"model cannot be loaded: .*hidden_size"),
    "GPTQ": Odd(
        config(quantization_config={"quant_method": "gptq", "bits": 4}), LOADING, r"model .*(quantised|optimum)"
    ),
    "code of its own": Odd(
        config(auto_map={"AutoConfig": "own.OwnConfig"}, model_type="own"),
        LOADING,
        r"model brings code of its own along: read it, and pass --trust_remote_code true",
    ),
    # Image processors.
    "no image processor": Odd(remove("model/preprocessor_config.json"), READING, r"model has no image processor: save"),
    "an unknown processor": Odd(
        processor(image_processor_type="Odd"), READING, r"model has an image processor that tr"
    ),
    # Data.
    "no data": Odd(remove("data"), READING, r"--dataset_name data cannot be loaded: "),
    "one class too many": Odd(classes("cat", "dog", "T-shirt-top", "owl"), READING, r"owl"),
    "damaged pictures": Odd(damaged_picture, READING, r"image \d+ \(.*\.png\) cannot be read: "),
    # Weights.
    "NaN": Odd(broken_weight(float("nan")), ("prune",), r"NaN"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a checkpoint and pictures that every command takes."""
    folder = tmp_path_factory.mktemp("whole")
    make_model().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    pictures(folder / "data", ("cat", "dog", "T-shirt-top"))
    return folder


@pytest.fixture
def work(whole, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the working directory."""
    import shutil

    shutil.copytree(whole, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def everything(folder: Path) -> set[str]:
    """Return the names of all that lies in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run(command: str) -> int:
    return main([command, "--model_name_or_path", "model", "--output_dir", "out", *ARGUMENTS[command]])


@pytest.mark.parametrize("command", EVERY)
def test_a_whole_checkpoint_is_taken_by_every_command(work, command, capfd):
    """Without this the errors below would tell nothing."""
    if command == "push":
        # What is published is sparse.
        assert run("prune") == 0
        (work / "model").rename(work / "dense")
        (work / "out" / "sparsity-0.5").rename(work / "model")
        (work / "out").rename(work / "pruned")
    assert run(command) == 0, capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "command"), [(name, command) for name, odd in ODD.items() for command in odd.commands]
)
def test_an_odd_input_is_one_line(work, name, command, capfd):
    odd = ODD[name]
    odd.change(work)
    before = everything(work)
    assert run(command) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith(f"cap-hf {command}: ")
    assert re.search(odd.words, said), said
    assert everything(work) == before
