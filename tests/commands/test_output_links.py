"""Every command takes a link to a folder for its output, and takes away nothing that it did not write."""

import os
import shutil
from functools import partial

import pytest
from support.checkpoints import make_checkpoint
from support.commands import FAST
from support.finetuning import QUICK
from transformers import ViTForImageClassification

from cap_hf import CAPCompressor, CAPConfig, CAPError, export_onnx
from cap_hf.commands.main import main

DATA = ["--max_eval_samples", "20", "--disable_tqdm", "True"]
COMMANDS = {
    "prune": ["--sparsity", "0.5", *FAST, "--checkpoint_every", "8", "--overwrite_output_dir"],
    "finetune": [*QUICK, "--save_steps", "2", "--overwrite_output_dir"],
    "evaluate": DATA,
    "inspect": [],
    "compress": ["--overwrite_output_dir"],
    "benchmark": ["--backends", "dense", "--batch_sizes", "1", "--runs", "3", "--disable_tqdm"],
    "push": ["--dry_run", "true", "--hub_model_id", "user/x", "--overwrite_output_dir"],
}


@pytest.fixture
def links(tmp_path, monkeypatch):
    """Links to a folder on a larger disk, one of them relative, and one to a folder that is not there yet."""
    (tmp_path / "disk" / "there").mkdir(parents=True)
    here = tmp_path / "here"
    here.mkdir()
    (here / "absolute").symlink_to(tmp_path / "disk" / "there")
    (here / "relative").symlink_to("../disk/there")
    (here / "new").symlink_to("../disk/new")
    (here / "round").symlink_to("round")
    monkeypatch.chdir(here)
    return here


def assert_links_stay(here):
    assert sorted(path.name for path in here.iterdir()) == ["absolute", "new", "relative", "round"]
    assert all(path.is_symlink() for path in here.iterdir())
    assert not list(here.parent.rglob(".*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_writes_where_a_link_leads(tiny_checkpoint, links, command, capsys):
    arguments = [command, "--model_name_or_path", str(tiny_checkpoint), *COMMANDS[command], "--output_dir"]
    for output in ("absolute", "relative", "new"):
        assert main([*arguments, output]) == 0, capsys.readouterr().err
        assert os.listdir(links / output)
        assert_links_stay(links)
    capsys.readouterr()
    assert main([*arguments, "round"]) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("cap-hf")]
    assert line.endswith("round is a link that leads back to itself: remove it, or choose another folder")
    assert_links_stay(links)


@pytest.mark.parametrize("command", ["prune", "finetune", "compress", "push"])
def test_a_command_that_would_lose_something_says_so_before_it_works(tiny_checkpoint, links, command, capsys):
    mine = links.parent / "mine"
    (mine / "sparsity-0.5").mkdir(parents=True)
    (mine / "sparsity-0.5" / "thesis.txt").write_text("years")
    shutil.copytree(tiny_checkpoint, mine, dirs_exist_ok=True)
    before = sorted(mine.rglob("*"))
    os.chdir(mine)  # the fixture leads back
    arguments = ["--model_name_or_path", str(tiny_checkpoint), *COMMANDS[command], "--output_dir", "."]
    assert main([command, *arguments]) == 1
    lost = "mine/sparsity-0.5 holds thesis.txt" if command == "prune" else "mine holds sparsity-0.5"
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("cap-hf")]
    assert f"{lost}, which would be lost" in line
    assert sorted(mine.rglob("*")) == before


def test_saving_over_other_files_is_refused(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "model")
    model = ViTForImageClassification.from_pretrained(tmp_path / "model")
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)
    monkeypatch.chdir(tmp_path)
    for write in (compressor.save_pretrained, partial(export_onnx, model)):
        with pytest.raises(CAPError, match="holds model, which would be lost"):
            write(".")
    with pytest.raises(CAPError, match="model is the checkpoint itself"):
        export_onnx(model, "model")
    # A checkpoint may be saved in its own place, and an export again.
    compressor.save_pretrained("model")
    for _ in range(2):
        export_onnx(model, "onnx")
    assert sorted(os.listdir()) == ["model", "onnx"]


def test_saving_writes_where_a_link_leads(links, tmp_path):
    model = make_checkpoint(tmp_path / "disk" / "model")
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)
    for output in ("absolute", "relative", "new"):
        for sparsity in (0.8, 0.9):
            compressor.prune(sparsity)
            compressor.save_pretrained(output)
        assert (links / output / "model.safetensors").is_file()
    assert_links_stay(links)
