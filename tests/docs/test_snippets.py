"""Every command and every Python snippet of README and docs/ runs, on tiny models, in the order of its page.

The names on the pages are made real instead of being replaced: a page is read in a folder where
`facebook/deit-small-patch16-224`, `M`, `imagenet-1k` and the like are tiny local checkpoints and datasets, which
transformers and datasets take before they ask a hub. Bash blocks are run by bash itself, with programs that only write
down how they were called; the calls are then carried out in this process.
"""

import argparse
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from PIL import Image
from support.hub_server import HubServer
from support.models import TINY_VIT
from support.pages import PAGES, ROOT, Block, read_blocks

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.commands.main import main
from cap_hf.data.images import collate, make_dataloader

# Languages of fenced blocks: what is run, what is written into the page's folder under its title, what is only read.
RUN, WRITTEN, READ = ("bash", "python"), ("yaml", "json"), ("text",)

# The names that stand for checkpoints and datasets on the pages.
DENSE = ("facebook/deit-small-patch16-224", "M", "M-cifar10", "vit-fashion")
BACKBONE = "facebook/dinov2-small"
SPARSE = {"O/sparsity-0.75": 0.75, "O/sparsity-0.9": 0.9, "user/name": 0.9, "pruned/sparsity-0.9": 0.9}
DATASETS = ("imagenet-1k", "D", "fashion-mnist", "cifar10")

# What cannot run here, by the beginning of the command, and why. Its arguments are parsed all the same, so that a
# renamed one fails; of a bash script the syntax is checked.
NOT_RUN = {
    "bash scripts/demo.sh": "installs packages and trains for minutes; tests/commands run the demo",
    "bash scripts/test.sh": "is the test suite",
    "bash scripts/setup.sh": "installs packages",
    "bash scripts/timm.sh": "installs packages",
    "bash scripts/wheel.sh": "builds and installs packages; tests/test_wheel.py builds it too",
    "python scripts/benchmarks/": "takes minutes to hours",
    "python scripts/recipes/": "needs torch-pruning; tests/inference run it",
    "cap-hf demo": "trains for minutes; tests/commands run it",
}
# Likewise, by an argument.
NOT_RUN_WITH = {
    "--resume": "needs a run that was killed",
    "--resume_from_checkpoint": "needs a run that was killed",
    "--max_accuracy_drop": "needs more images than these datasets have; tests/commands run it",
}
# Scripts that hand what they do not know on to a command.
HAND_ON = {
    "scripts/recipes/structured_then_cap.py": "prune",
    "scripts/benchmarks/accuracy.py": "prune",
    "scripts/benchmarks/budgets.py": "prune",
}
# Arguments that make a command quick; the names of the page's own stay as they are.
QUICK = {
    "benchmark": ["--backends", "dense", "sparse", "--runs", "3"],
    "finetune": ["--use_cpu", "True", "--per_device_train_batch_size", "8"],
}

PROGRAMS = ("cap-hf", "accelerate", "python", "bash", "pip")
SHIM = '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@" >> "$CALLS"\nprintf "\\x1e\\0" >> "$CALLS"\n'


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint or dataset under each of the names."""
    folder = tmp_path_factory.mktemp("names")
    labels = {str(digit): digit for digit in range(10)}
    transformers.set_seed(0)
    config = transformers.ViTConfig(
        **{name: value for name, value in TINY_VIT.items() if name != "num_labels"},
        id2label={digit: name for name, digit in labels.items()},
        label2id=labels,
    )
    model = transformers.ViTForImageClassification(config)
    processor = transformers.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    for name in DENSE:
        save_checkpoint(folder / name, model, image_processor=processor)
    for name, sparsity in SPARSE.items():
        compressor = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)
        report = {"model_name_or_path": "M", "pruning": compressor.prune(sparsity).to_dict()}
        save_checkpoint(folder / name, model, compressor.config, report, processor)
    transformers.set_seed(0)
    backbone = transformers.Dinov2Model(transformers.Dinov2Config(**TINY_VIT, mlp_ratio=2))
    save_checkpoint(folder / BACKBONE, backbone, image_processor=processor)
    for name in DATASETS:
        make_dataset(folder / name, labels)
    return folder


@pytest.fixture(autouse=True)
def fast_bfloat16(monkeypatch):
    """Recovery refuses bfloat16 on processors that emulate it; these models are too small for it to matter."""
    monkeypatch.setattr("cap_hf.recovery.precision.bfloat16_ratio", lambda: 1.0)


def make_dataset(folder: Path, labels: dict[str, int]) -> None:
    """Write 40 images to train on and 20 to test on, as parquet files."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(labels)))
    for split, count in (("train", 40), ("test", 20)):
        values = [index % 10 for index in range(count)]
        pixels = torch.randint(0, 256, (count, 8, 8), generator=torch.Generator().manual_seed(count)).byte().numpy()
        images = [Image.fromarray(each) for each in pixels]
        folder.mkdir(parents=True, exist_ok=True)
        split_data = datasets.Dataset.from_dict({"image": images, "label": values}, features=features)
        split_data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, which huggingface_hub takes for its own and may write to."""
    constants = huggingface_hub.constants
    with HubServer() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of these sizes gain nothing from a second one, and lose much on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page, names, hub, tmp_path, monkeypatch):
    shutil.copytree(names, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    variables = make_variables()
    for block in read_blocks(page):
        place = f"{block.page.name}:{block.line}"
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), variables)
        elif block.language == "bash":
            for call in read_calls(block, tmp_path):
                carry_out(call, place)
        elif block.language in WRITTEN:
            assert block.title, f"{place}: a block of {block.language} needs the name of its file after the fence"
            Path(block.title).write_text(block.text)
        else:
            assert block.language in READ, f"{place}: blocks of {block.language!r} are neither run nor known"


def make_variables() -> dict[str, object]:
    """Return what Python snippets take for given."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(32, 1, 8, 8, generator=generator)
    examples = [{"pixel_values": image, "labels": torch.tensor(index % 10)} for index, image in enumerate(pixels)]
    loader = make_dataloader(examples, 16)
    model = transformers.AutoModelForImageClassification.from_pretrained("M")
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)
    compressor.prune(0.9)
    return {
        "train_dataset": examples,
        "eval_dataset": examples,
        "data_collator": collate,
        "train_dataloader": loader,
        "calibration_dataloader": loader,
        "image_processor": transformers.AutoImageProcessor.from_pretrained("M"),
        "model": model,
        "compressor": compressor,
    }


def read_calls(block: Block, folder: Path) -> list[list[str]]:
    """Return the commands that a bash block calls, each as program and arguments.

    Bash runs the block, so that variables, quotes, comments and joined lines are what they are to a reader. A program
    that is none of `PROGRAMS` ends it with an error.
    """
    programs, calls = folder / ".programs", folder / ".calls"
    programs.mkdir(exist_ok=True)
    for name in PROGRAMS:
        (programs / name).write_text(SHIM)
        (programs / name).chmod(0o755)
    calls.write_bytes(b"")
    environment = {"PATH": str(programs), "CALLS": str(calls), "HOME": str(folder)}
    command = ["/bin/bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.page.name}:{block.line}: {done.stderr}"
    return [call.split("\0")[:-1] for call in calls.read_text().split("\x1e\0")[:-1]]


def carry_out(call: list[str], place: str) -> None:
    """Run a command of a page, or parse its arguments where it cannot run here."""
    program, *arguments = call
    text = " ".join(call)
    not_run = any(text.startswith(start) for start in NOT_RUN) or any(each in arguments for each in NOT_RUN_WITH)
    if program == "accelerate":
        arguments = without_launcher(arguments, place)
        program = "cap-hf"
    if program == "cap-hf":
        if not_run:
            assert_parsed(lambda: main(arguments), f"{place}: {text}")
            return
        if arguments[0] != "report":  # which is of what lies there
            clear_output(arguments)
        assert main([*arguments, *QUICK.get(arguments[0], [])]) == 0, f"{place}: {text}"
    elif program == "python" and not_run:
        script = ROOT / arguments[0]
        with mock.patch.object(sys, "argv", arguments), mock.patch.object(sys, "path", [str(script.parent), *sys.path]):
            run = lambda: runpy.run_path(str(script), run_name="__main__")  # noqa: E731
            assert_parsed(run, f"{place}: {text}", HAND_ON.get(arguments[0]))
    elif program == "bash" and not_run:
        subprocess.run(["/bin/bash", "-n", str(ROOT / arguments[0])], check=True)
    elif program == "pip":
        check_extras(arguments, place)
    else:
        pytest.fail(f"{place}: {text!r} is neither run nor in NOT_RUN")


def without_launcher(arguments: list[str], place: str) -> list[str]:
    """Check the arguments of `accelerate launch`, and return those of `cap-hf` that the launched script stands for."""
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch", place
    launched = launch_command_parser().parse_args(arguments[1:])
    script = ROOT / launched.training_script
    assert script.is_file(), f"{place}: there is no {launched.training_script}"
    return [script.stem, *launched.training_script_args]


def clear_output(arguments: list[str]) -> None:
    """Remove what an earlier command of the page has left under this one's output folder: readers run one of them."""
    if "--output_dir" in arguments:
        name = arguments[arguments.index("--output_dir") + 1]
        for folder in (name, f"{name}-training", f"{name}-collection"):
            shutil.rmtree(folder, ignore_errors=True)


PARSE = argparse.ArgumentParser.parse_known_args


class Parsed(BaseException):
    """Ends a program once its arguments are parsed."""


def assert_parsed(program, text: str, rest: str | None = None) -> None:
    """Run a program until it has parsed its arguments, all of which it or the command named by `rest` must know."""

    def stop(parser, *args, **kwargs):
        _, unknown = PARSE(parser, *args, **kwargs)
        if unknown and rest is not None:
            # The checkpoint is the program's own argument, which it hands on as well.
            assert_parsed(lambda: main([rest, "--model_name_or_path", "M", *unknown]), text)
            unknown = []
        assert not unknown, f"{text}: there is no {unknown}"
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop), pytest.raises(Parsed):
        program()


def check_extras(arguments: list[str], place: str) -> None:
    """Check that the extras of this package which a page installs exist."""
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for argument in arguments[1:]:
        name, _, extra = argument.rstrip("]").partition("[")
        assert name == "cap_hf", f"{place}: {argument} is not installed by a page"
        assert extra in config["options.extras_require"], f"{place}: there is no extra {extra!r}"
