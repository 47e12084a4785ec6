"""What commands load: whole checkpoints as safetensors, with their image processor; from the Hub if it answers."""

import json
import socket
import subprocess
import threading

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.backbones import backbone_checkpoint
from support.checkpoints import PYTHON, clean_environment, make_checkpoint
from support.commands import image_folder, prune
from support.families import VIT, Family
from support.hub_server import HubServer, Repo
from transformers import SiglipImageProcessorPil, ViTConfig, ViTModel

from cap_hf.commands.arguments import ModelArguments
from cap_hf.commands.common import bank_split, image_dataset, load_all
from cap_hf.commands.main import main
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import calibration_split
from cap_hf.errors import CAPError

SIDES = {"height": 8, "width": 8}


def test_a_model_that_does_not_fit_is_one_line(tiny_checkpoint, tmp_path, capsys):
    assert prune(tmp_path / "nowhere", tmp_path / "out", "--sparsity", "0.5") == 1
    assert "there is no folder" in capsys.readouterr().err
    # The weights of a backbone under the name of a classifier: it must not come up with a random head.
    backbone = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    backbone.save_pretrained(tmp_path / "backbone")
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    config["architectures"] = ["ViTForImageClassification"]
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(config))
    assert prune(tmp_path / "backbone", tmp_path / "out", "--sparsity", "0.5") == 1
    error = capsys.readouterr().err
    # transformers' table of what was loaded does not come before it.
    assert "LOAD REPORT" not in error
    assert "MISSING" not in error
    assert "has no weights for classifier" in error.splitlines()[-1]
    (tiny_checkpoint / "preprocessor_config.json").unlink()
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.5") == 1
    assert "has no image processor: " in capsys.readouterr().err
    (tiny_checkpoint / "model.safetensors").write_bytes(b"\0" * 100)
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.5") == 1
    assert "model.safetensors cannot be read as safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pickled_checkpoint_is_refused(tiny_checkpoint, tmp_path, capsys):
    weights = load_file(tiny_checkpoint / "model.safetensors")
    (tiny_checkpoint / "model.safetensors").unlink()
    torch.save(weights, tiny_checkpoint / "pytorch_model.bin")
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.5") == 1
    assert "safetensors" in capsys.readouterr().err


def test_weights_that_the_model_does_not_use_are_named(tiny_checkpoint, tmp_path, caplog):
    weights = load_file(tiny_checkpoint / "model.safetensors")
    save_file({**weights, "vit.extra.weight": torch.zeros(2)}, tiny_checkpoint / "model.safetensors", {"format": "pt"})
    arguments = ["--model_name_or_path", str(tiny_checkpoint), "--output_dir", str(tmp_path), "--max_eval_samples", "8"]
    assert main(["evaluate", *arguments]) == 0
    assert "has weights that ViTForImageClassification does not use: vit.extra.weight" in caplog.text


def evaluate(home, endpoint, name):
    """Run `cap-hf evaluate` in a process that knows one Hub only."""
    command = [PYTHON, "-m", "cap_hf.commands.main", "evaluate", "--model_name_or_path", name]
    environment = clean_environment(home, HF_ENDPOINT=endpoint)
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home, timeout=120)


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                calls.append(connection.recv(100).split()[:2])
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        done = evaluate(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}", "user/model")
    assert done.returncode == 1
    assert len(calls) == 1, calls
    lines = done.stderr.splitlines()
    assert lines[0].startswith("The Hub cannot be reached (")
    assert lines[1].startswith("cap-hf evaluate: user/model cannot be loaded: ")
    assert len(lines) == 2


def test_what_is_cached_is_used_where_the_hub_does_not_answer(tmp_path):
    make_checkpoint(tmp_path / "m")
    home = tmp_path / "home"
    home.mkdir()
    load = """
from cap_hf.commands.arguments import ModelArguments
from cap_hf.commands.common import load_companions, load_image_processor, load_model
print(load_model(ModelArguments("user/m")).num_parameters(), load_image_processor(ModelArguments("user/m")).size)
print([path.name for path in load_companions(ModelArguments("user/m"))])
"""
    with HubServer() as server:
        files = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
        files |= {"tokenizer.json": b"{}", "merges.txt": b"#version: 0.2"}
        server.repos["user/m"] = Repo(branches={"main": files})
        environment = clean_environment(home, HF_ENDPOINT=server.url)
        done = subprocess.run([PYTHON, "-c", load], env=environment, capture_output=True, text=True, cwd=home)
        assert done.returncode == 0, done.stderr[-2000:]
    again = subprocess.run([PYTHON, "-c", load], env=environment, capture_output=True, text=True, cwd=home)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout == done.stdout
    assert done.stdout.splitlines()[-1] == "['tokenizer.json', 'merges.txt']"
    assert "Retrying" not in again.stderr
    assert "The Hub cannot be reached" in again.stderr


def test_what_does_not_fit_is_said_before_anything_runs(tiny_checkpoint, tmp_path):
    """A processor of other channels than the model's, or a first image that cannot be read."""
    folder = image_folder(tmp_path / "d", ("train",), ("0", "1"))
    data_args = DataArguments(str(folder))
    model, processor, splits = load_all(ModelArguments(str(tiny_checkpoint)), data_args, 1, ["train"])
    assert len(image_dataset(splits["train"], processor, model, data_args)) == 2
    colours = type(processor)(size={"height": 8, "width": 8}, do_convert_rgb=True)
    with pytest.raises(
        CAPError, match="makes images of 3 channels .8x8 pixels. and the model takes 1: look at do_conv"
    ):
        image_dataset(splits["train"], colours, model, data_args)
    (folder / "train" / "0" / "0.png").write_bytes(b"")
    with pytest.raises(CAPError, match=r"image 0 \(.*0.png\) cannot be read"):
        image_dataset(splits["train"], processor, model, data_args)


def test_a_composite_model_of_grey_images_gets_grey_images():
    """Its config has the number of channels in its vision part: pictures were made RGB, and nothing was checked."""
    vision = {"vision_config": VIT | {"num_channels": 1}, "num_labels": 2}
    model = Family("SiglipForImageClassification", vision, 8, 12).build()
    split = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8), "red")] * 2})
    found = image_dataset(
        split,
        SiglipImageProcessorPil(size=SIDES, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False),
        model,
        DataArguments(),
    )
    assert found[0]["pixel_values"].shape == (1, 8, 8)
    with pytest.raises(CAPError, match="makes images of 3 channels .8x8 pixels. and the model takes 1"):
        image_dataset(split, SiglipImageProcessorPil(size=SIDES, do_convert_rgb=True), model, DataArguments())


def test_the_bank_is_apart_from_the_calibration_where_there_is_enough():
    split = datasets.Dataset.from_dict({"number": list(range(100))})
    used = set(calibration_split(split, 30, seed=1)["number"])
    for size in (50, 70):
        bank = bank_split(split, 30, size, seed=1)["number"]
        assert len(set(bank)) == size
        assert not used & set(bank)
    assert bank_split(split, 30, 50, seed=1)["number"][:] == bank_split(split, 30, 70, seed=1)["number"][:50]
    assert len(used & set(bank_split(split, 30, 80, seed=1)["number"])) == 10
    assert len(bank_split(split, 300, 80, seed=1)) == 80
    assert len(bank_split(split, 30, 5000, seed=1)) == 100


def test_a_bank_is_loaded_where_there_is_no_head_but_labels(tiny_checkpoint, tmp_path):
    backbone = ModelArguments(str(backbone_checkpoint(tmp_path / "backbone")))
    labelled, plain = DataArguments(), image_folder(tmp_path / "plain", ("train", "test"), ("",))
    for model_args, data_args, bank_size, names in (
        (backbone, labelled, 60, {"train", "eval", "bank"}),
        (backbone, labelled, 0, {"train", "eval"}),
        (backbone, DataArguments(str(plain)), 60, {"train", "eval"}),
        (ModelArguments(str(tiny_checkpoint)), labelled, 60, {"train", "eval"}),
    ):
        model, processor, splits = load_all(model_args, data_args, 1, train_examples=32, bank_size=bank_size)
        assert splits.keys() == names
        assert len(splits.get("bank", ())) == (60 if "bank" in names else 0)
    assert image_dataset(splits["eval"], processor, model, labelled).labelled
    assert load_all(backbone, labelled, 1, ["eval"], bank_size=60)[2].keys() == {"eval", "bank"}
    # More images to train on leave the bank as it is.
    fewer, more = (
        load_all(backbone, labelled, 1, train_examples=count, bank_size=60, apart=32)[2]["bank"] for count in (32, 500)
    )
    assert fewer["label"][:] == more["label"][:]
