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
    below_file,
    broken_weight,
    classes,
    config,
    cut,
    damaged_picture,
    is_file,
    link,
    nothing,
    painted,
    pickled,
    pictures,
    prefixed,
    processor,
    quantised,
    remove,
    text_model,
    two_configurations,
    two_splits_in_one,
    unlabelled_test,
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
    """An input that cannot be used.

    Attributes:
        change: makes it of what can be used.
        commands: who meets it.
        words: what their line says, a regular expression.
        arguments: that are added to a command's own.
    """

    change: Change
    commands: tuple[str, ...]
    words: str
    arguments: tuple[str, ...] = ()


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
    "pictures are not resized": Odd(
        processor(do_resize=False), READING, r"image 0 \(.*0\.png\) 8x8 pixels and image 1 .* do not fit into one batch"
    ),
    "pictures of another size": Odd(
        processor(size={"height": 16, "width": 16}),
        (*READING, "benchmark"),
        r"pixel_values of .*16, 16\) .*\(batch, 3, 8, 8\)",
    ),
    "a mean for two channels": Odd(
        processor(image_mean=[0.5, 0.5]), READING, r"cannot take image 0 \(.*\.png\) .* mean must have 3 elements"
    ),
    "no deviation": Odd(processor(image_std=[0, 0, 0]), READING, r"pixels that are no numbers: look at image_std"),
    # Pictures.
    "damaged pictures": Odd(damaged_picture, READING, r"image \d+ \(.*\.png\) cannot be read: "),
    "floats beyond 1": Odd(painted("F", 300.0, ".tiff"), READING, r"image 0 \(.*\.tiff\) .* values are 300 to 300"),
    "32 bits": Odd(painted("I", 10**6, ".tiff"), READING, r"image 0 \(.*\.tiff\) .* white is taken to be 65535"),
    "12 bits or dark": Odd(
        painted("I;16", 300, ".png"), READING, r"image 0 \(.*\.png\) .* above 300: .* --white_level"
    ),
    # Datasets and labels.
    "no data": Odd(remove("data"), READING, r"--dataset_name data cannot be loaded: it is no folder"),
    "data is a file": Odd(is_file("data"), READING, r"--dataset_name data is a file"),
    "two configurations": Odd(
        two_configurations, READING, r"several configurations: .*--dataset_config_name, small, l"
    ),
    "no classes in test/": Odd(unlabelled_test, ("evaluate", "finetune"), r"no (column of )?labels"),
    "one class too many": Odd(classes("cat", "dog", "T-shirt-top", "owl"), READING, r"4 classes .* not owl"),
    "classes from 1": Odd(classes("1", "2", "3"), READING, r"counts the classes from 1 to 3, the model .* from 0"),
    "names and numbers": Odd(classes("0", "dog", "2"), READING, r"mixes names \(dog\) and numbers \(0, 2\)"),
    "a folder of two splits": Odd(two_splits_in_one, READING, r"data/train_test.* is called as a split"),
    "names in other places": Odd(classes("aardvark", "cat", "dog"), READING, r"not aardvark"),
    # Models for something else.
    "text": Odd(text_model, LOADING, r"BertModel takes no images"),
    "labels that are not one of several": Odd(
        config(problem_type="multi_label_classification"), READING, r"pick one label of several, and .* multi_label_cl"
    ),
    "regression": Odd(config(problem_type="regression"), READING, r"pick one label of several, and .* regression"),
    "int8": Odd(
        quantised, ("prune", "finetune"), r"the weights of ViTForImageClassification are quantised \(torchao\)"
    ),
    "NaN": Odd(broken_weight(float("nan")), LOADING, r"vit.*\.weight has entries that are NaN or infinite"),
    "infinite": Odd(broken_weight(float("inf")), LOADING, r"vit.*\.weight has entries that are NaN or infinite"),
    # Where the output goes.
    "a link to itself": Odd(link("out", "out"), EVERY, r"out is a link that leads back to itself"),
    "a file": Odd(is_file("out"), EVERY, r"out is a file: choose another --output_dir"),
    "a folder with other things": Odd(
        nothing,
        ("finetune", "compress", "push"),
        r"data.* would be lost",
        ("--output_dir", ".", "--overwrite_output_dir", "true"),
    ),
    "what publishes while it trains": Odd(
        nothing,
        ("finetune",),
        r"--hub_always_push has nothing to push while it trains",
        ("--push_to_hub", "true", "--hub_always_push", "true"),
    ),
    "below a file": Odd(below_file("out"), EVERY, r"is a file: choose another --output_dir"),
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


def run(command: str, *arguments: str) -> int:
    return main([command, "--model_name_or_path", "model", "--output_dir", "out", *ARGUMENTS[command], *arguments])


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
    capfd.readouterr()  # what was said while it was made
    assert run(command, *odd.arguments) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith(f"cap-hf {command}: ")
    assert re.search(odd.words, said), said
    assert everything(work) == before
