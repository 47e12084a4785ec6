"""`cap-hf benchmark`: a table, a report, a picture; mistakes are one line."""

import json

import numpy as np
import pytest
from PIL import Image
from support.checkpoints import make_checkpoint

from cap_hf.commands import benchmark as command
from cap_hf.commands.main import main
from cap_hf.inference.backends import BACKENDS


def test_names_are_those_that_are_measured():
    assert list(BACKENDS) == list(command.BACKENDS)


def test_command_writes_table_report_and_plot(tmp_path, capsys):
    make_checkpoint(tmp_path / "pruned", 0.9)
    arguments = ["--backends", "sparse", "onnxruntime", "--batch_sizes", "1", "2", "--threads", "1", "--runs", "3"]
    folder = tmp_path / "out"
    code = main(
        ["benchmark", "--model_name_or_path", str(tmp_path / "pruned"), "--output_dir", str(folder), *arguments]
    )
    out = capsys.readouterr().out
    assert code == 0
    report = json.loads((folder / "benchmark.json").read_text())
    assert report["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert report["image_size"] == [8, 8]
    assert "90.0 % sparse, images of 8 x 8 (" in out
    assert len(report["measurements"]) == 6
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert sum(line.startswith(("dense", "sparse", "onnxruntime")) for line in out.splitlines()) == 6
    assert all(line in out for line in (*report["sparse_loses"], *report["fastest"]))
    assert [line.partition(": fastest here: ")[0] for line in report["fastest"]] == [
        "batch 1, 1 threads",
        "batch 2, 1 threads",
    ]
    assert "random images" not in out


def test_int8_is_calibrated_on_a_dataset_or_says_that_it_is_not(tmp_path, capsys):
    make_checkpoint(tmp_path / "pruned", 0.9)
    write_images(tmp_path / "images", 3)
    common = ["benchmark", "--model_name_or_path", str(tmp_path / "pruned"), "--output_dir", str(tmp_path / "out")]
    common += ["--backends", "onnxruntime_int8", "--batch_sizes", "2", "--threads", "1", "--runs", "3"]
    assert main(common) == 0
    out = capsys.readouterr().out
    assert "int8 was calibrated and outputs were compared on random images: speeds are right" in out
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text())["measurements"][1]["images"] == 16
    assert main([*common, "--dataset_name", str(tmp_path / "images")]) == 0
    out = capsys.readouterr().out
    assert "random images" not in out
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert report["dataset_name"] == str(tmp_path / "images")
    assert [each["images"] for each in report["measurements"]] == [3, 3]
    assert [each["same_top1"] is not None for each in report["measurements"]] == [True, True]
    assert main([*common, "--dataset_name", str(tmp_path / "images"), "--num_images", "2"]) == 0
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [each["images"] for each in report["measurements"]] == [2, 2]


def write_images(folder, count):
    """A folder of noisy images of one class, whose name is none of the model's."""
    generator = np.random.default_rng(0)
    (folder / "train" / "elsewhere").mkdir(parents=True)
    for index in range(count):
        pixels = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / "elsewhere" / f"{index}.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_sizes", "0"], "--batch_sizes must be at least 1"),
        (["--image_size", "8", "8", "3"], "--image_size takes one number, or two, height and width, of at least 1"),
        (
            ["--image_size", "16", "12"],
            "pixel_values of (2, 3, 16, 12) (its config tells of (batch, 3, 8, 8)): ",
        ),
        (
            ["--image_size", "8", "--dataset_name", "digits"],
            "--image_size is for random images: those of a dataset are as large as the image processor says",
        ),
        (["--num_images", "1"], "--num_images must be at least 2"),
        (["--runs", "0"], "--runs must be at least 1"),
        (["--backends", "fast"], "argument --backends: invalid choice: 'fast'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    make_checkpoint(tmp_path / "pruned", 0.9)
    code = main(["benchmark", "--model_name_or_path", str(tmp_path / "pruned"), "--disable_tqdm", "True", *arguments])
    assert code == 1
    assert message in capsys.readouterr().err
    assert command.BenchmarkArguments().runs == 15
