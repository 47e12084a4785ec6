"""Folders that somebody else made: every command ends well or with one line, and no damage goes unnoticed."""

import json
import os
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from support.checkpoints import make_checkpoint

from cap_hf.commands.main import run as run_command


def flip_a_bit(path):
    """The lowest one of the first value: the values lie first, what says where they go behind them."""
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    path.write_bytes(data)


def test_inspect_and_push_find_a_flipped_bit(tmp_path, capsys):
    make_checkpoint(tmp_path / "m", compressed=True)
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "out")]
    assert run_command("inspect", command) == 0
    assert "The bytes of every stored tensor are those that were written\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["digests_checked"]
    flip_a_bit(tmp_path / "m" / "model.cap.safetensors")
    for name, extra in (("inspect", []), ("push", ["--hub_model_id", "a/b", "--dry_run", "--overwrite_output_dir"])):
        assert run_command(name, [*command, *extra]) == 1
        assert "than were written: the file is damaged" in capsys.readouterr().err


def test_inspect_says_that_a_file_of_an_earlier_version_has_no_digests(tmp_path, capsys):
    make_checkpoint(tmp_path / "m", compressed=True)
    path = tmp_path / "m" / "model.cap.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"format": "pt"})
    assert run_command("inspect", ["--model_name_or_path", str(path.parent), "--output_dir", str(tmp_path)]) == 0
    assert "The files have no digests" in capsys.readouterr().out


# What was a traceback, or was taken for what it said, before it was looked at: file, place, value.
MUTATIONS = [
    ("report.json", [], [1]),
    ("report.json", ["seed"], "# x"),
    ("report.json", ["data"], "x"),
    ("report.json", ["data", "dataset_name"], 7),
    ("report.json", ["model_name_or_path"], "x" * 5000 + "/y"),
    ("report.json", ["model_name_or_path"], ["x"]),
    ("report.json", ["versions"], [1]),
    ("report.json", ["training_arguments"], "x"),
    ("report.json", ["teacher_model_name_or_path"], ["x"]),
    ("report.json", ["num_processes"], "2"),
    ("report.json", ["sparse", "num_examples"], "8"),
    ("report.json", ["sparse", "top1"], 10**400),
    ("report.json", ["pruning"], [1]),
    ("report.json", ["pruning", "layers", 0], None),
    ("report.json", ["pruning", "layers", 0, "name"], [1]),
    ("cap_config.json", [], 5),
    ("cap_config.json", ["damp"], "x"),
    ("cap_config.json", ["exclude"], [1]),
    ("cap_config.json", ["include"], 5),
    ("config.json", [], "x"),
    ("config.json", ["num_hidden_layers"], 10**9),
    ("config.json", ["hidden_size"], 10**7),
    ("config.json", ["hidden_size"], -1),
    ("config.json", ["id2label"], 5),
    ("config.json", ["auto_map"], 5),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_checkpoint(folder / "m")
    return folder / "m"


@pytest.mark.parametrize(("name", "place", "value"), MUTATIONS)
def test_no_content_of_a_file_ends_in_a_traceback(whole, name, place, value, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "m")
    root = {"root": json.loads((tmp_path / "m" / name).read_text())}
    parent = root
    for key in ["root", *place][:-1]:
        parent = parent[key]
    parent[["root", *place][-1]] = value
    (tmp_path / "m" / name).write_text(json.dumps(root["root"]))
    run_all(tmp_path, capfd)


@pytest.mark.parametrize(
    "name", ["config.json", "report.json", "cap_config.json", "preprocessor_config.json", "model.safetensors"]
)
@pytest.mark.parametrize("kind", ["folder", "link", "loop", "pipe", "empty", "nested", "device"])
def test_no_kind_of_file_ends_in_a_traceback(whole, name, kind, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "m")
    path = tmp_path / "m" / name
    path.unlink()
    {
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("/etc/hostname"),
        "loop": lambda: path.symlink_to(name),
        "pipe": lambda: os.mkfifo(path),
        "empty": lambda: path.write_text(""),
        "nested": lambda: path.write_text("[" * 100_000),
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    run_all(tmp_path, capfd, push_fails=True)


def run_all(folder, capfd, push_fails=False):
    """Each command ends with 0, or with 1 and one line, and leaves nothing behind then."""
    for command, extra in (
        ("inspect", []),
        ("compress", []),
        ("push", ["--hub_model_id", "a/b", "--dry_run", "true"]),
    ):
        arguments = ["--model_name_or_path", str(folder / "m"), "--output_dir", str(folder / command), *extra]
        code = run_command(command, arguments)
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "it/s]" not in line]
        assert (code, len(lines)) in ((0, 0), (1, 1)), lines
        assert code == 1 or not (push_fails and command == "push")
        if code:
            assert lines[0].startswith(f"cap-hf {command}: ")
            assert not (folder / command).exists()
            assert ".partial" not in lines[0]
