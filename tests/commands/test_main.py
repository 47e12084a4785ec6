"""`cap-hf`: commands are found, what goes wrong is one line, and nothing heavy is imported before it is needed."""

import signal
import subprocess
import sys
import time
import types

import pytest
from support.checkpoints import PYTHON, clean_environment
from support.commands import DIGITS, image_folder, prune
from torch.utils.data import DataLoader, Dataset

from cap_hf import CAPError
from cap_hf.commands import main as module
from cap_hf.commands.main import COMMANDS, main
from cap_hf.errors import ModelFailure


def test_help_and_unknown_commands(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert main([]) == 2
    assert main(["shrink"]) == 2
    assert "there is no command 'shrink'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["prune", "--help"])
    assert caught.value.code == 0
    assert "--fisher_block_size" in capsys.readouterr().out


# Everything that takes seconds to import.
HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "huggingface_hub")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("", 2),
        ("--help", 0),
        ("nope", 2),
        *((f"{command} --help", 0) for command in COMMANDS if command != "finetune"),
        *((f"{command} --nope", 1) for command in COMMANDS if command != "finetune"),
        ("prune --sparsity 0.5", 1),
        ("prune --model_name_or_path x", 1),
        ("prune --model_name_or_path x --sparsity 1", 1),
        ("prune --model_name_or_path x --allocation 2:4 --sparsity 0.6", 1),
        ("prune --model_name_or_path x --sparsity 0.5 --damp 0", 1),
        ("prune --model_name_or_path x --sparsity 0.5 --max_memory much", 1),
        ("prune --model_name_or_path x --sparsity 0.5 --resume", 1),
        ("prune --model_name_or_path x --sparsity 0.5 --output_dir FILE", 1),
        ("prune FILE.yaml", 1),
        ("evaluate --model_name_or_path /nope", 1),
        ("inspect --model_name_or_path x --fisher_block_size none", 1),
        ("compress --model_name_or_path x --output_dir FILE", 1),
        ("push --model_name_or_path x", 1),
        ("benchmark --model_name_or_path x --backends fast", 1),
        ("benchmark --model_name_or_path x --threads 0", 1),
    ],
)
def test_help_and_wrong_arguments_come_before_anything_heavy(tmp_path, arguments, code):
    (tmp_path / "FILE").touch()
    script = f"""
import sys
from cap_hf.commands.main import main
try:
    code = main({arguments.split()!r})
except SystemExit as caught:
    code = caught.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert (code, loaded) == ({code}, []), (code, loaded)
"""
    done = subprocess.run(
        [PYTHON, "-c", script], env=clean_environment(tmp_path), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == (1 if code == 1 or "nope" in arguments else 0)


def test_only_our_line_is_printed(tmp_path):
    """Importing transformers makes torchao speak where it is installed, as it is for the tests."""
    (tmp_path / "empty").mkdir()
    command = [PYTHON, "-m", "cap_hf.commands.main", "evaluate", "--model_name_or_path", "empty"]
    done = subprocess.run(
        command, env=clean_environment(tmp_path, HF_HUB_OFFLINE="1"), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.startswith("cap-hf evaluate: empty/config.json is not there")
    assert len(done.stderr.splitlines()) == 1, done.stderr


class Failing(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.fixture
def fail(monkeypatch):
    """Make `cap-hf inspect` end with an error, raised by so many workers of a DataLoader."""

    def install(error, workers):
        command = types.ModuleType("cap_hf.commands.inspect")
        command.main = lambda argv: list(DataLoader(Failing(error), num_workers=workers))
        monkeypatch.setitem(sys.modules, "cap_hf.commands.inspect", command)

    return install


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CAPError(), "failed, and the error does not say why"),
        (CAPError("image 7 is torn"), "image 7 is torn"),
        (CAPError("two\n  lines"), "two lines"),
        (RuntimeError("two\n  lines"), "RuntimeError: two lines (CAP_HF_TRACEBACK=1 shows where)"),
    ],
)
def test_an_error_is_one_line_wherever_it_is_raised(fail, capsys, workers, error, line):
    fail(error, workers)
    assert module.run("inspect", []) == 1
    assert capsys.readouterr().err == f"cap-hf inspect: {line}\n"


@pytest.mark.parametrize(("cause", "shows"), [(TypeError("a mistake"), True), (ValueError("Input image size"), False)])
def test_where_a_model_may_have_a_mistake_the_line_says_how_to_see_it(cause, shows):
    error = ModelFailure("ViT fails on pixels")
    error.__cause__ = cause
    assert module.message(error) == f"ViT fails on pixels{' (CAP_HF_TRACEBACK=1 shows where)' if shows else ''}"


def test_a_traceback_is_shown_to_those_who_ask(fail, capsys, monkeypatch):
    fail(RuntimeError("odd"), 0)
    monkeypatch.setenv("CAP_HF_TRACEBACK", "1")
    assert module.run("inspect", []) == 1
    *trace, line = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback")
    assert any("in __getitem__" in each for each in trace)
    assert line == "cap-hf inspect: RuntimeError: odd (CAP_HF_TRACEBACK=1 shows where)"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_one_line(tiny_checkpoint, tmp_path, capsys, workers):
    image_folder(tmp_path / "data", ("train", "test"), DIGITS)
    (tmp_path / "data" / "test" / "7" / "0.png").write_bytes(b"GIF89a")
    data = ["--sparsity", "0.5", "--dataset_name", str(tmp_path / "data"), "--dataloader_num_workers", workers]
    assert prune(tiny_checkpoint, tmp_path / "out", *data) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cap-hf prune: image 7 (")
    assert "0.png) cannot be read" in error


def test_ctrl_c_leaves_nothing_half_written(tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    # Many batches of one example with many gradients each: there is plenty of time to interrupt them.
    arguments = ["--num_grads", "128000", "--per_device_batch_size", "1", "--sparsity", "0.5"]
    arguments += ["--fisher_loss", "features", "--feature_projections", "128"]
    arguments += ["--model_name_or_path", str(tiny_checkpoint), "--output_dir", str(output), "--no_do_eval"]
    command = [sys.executable, "-m", "cap_hf.commands.main", "prune", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "Collecting" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "interrupted" in rest
    assert not output.exists()
