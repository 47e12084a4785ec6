"""`cap-hf inspect`: what it sees is what `cap-hf prune` reported."""

import json

from support.commands import prune
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from cap_hf.commands.main import main


def test_the_zeros_are_those_of_the_report(tiny_checkpoint, tmp_path, capsys):
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.75", "--no_do_eval") == 0
    pruning = json.loads((tmp_path / "out" / "report.json").read_text())["results"][0]["pruning"]
    folder, seen = tmp_path / "out" / "sparsity-0.75", tmp_path / "seen"
    capsys.readouterr()
    assert main(["inspect", "--model_name_or_path", str(folder), "--output_dir", str(seen)]) == 0
    printed = capsys.readouterr().out
    assert "75.00 % of them 0" in printed
    report = json.loads((seen / "inspect.json").read_text())
    assert report["num_zeros"] == pruning["num_zeros"]
    assert [layer["name"] for layer in report["layers"]] == [layer["name"] for layer in pruning["layers"]]
    # In a ViT all weights see the same tokens, 17 of an image of 8 pixels in patches of 2.
    tokens = report["multiply_adds"] // report["num_weights"]
    assert (report["multiply_adds"], report["image_size"]) == (tokens * report["num_weights"], [8, 8])
    assert report["kept_multiply_adds"] == tokens * (report["num_weights"] - report["num_zeros"])
    assert f"Of an image of 8x8 they take {report['kept_multiply_adds']:,} multiply-adds, 25.00 % of the " in printed


def test_where_an_image_cannot_be_had_multiply_adds_are_said_not_to_be_counted(tiny_checkpoint, tmp_path, capsys):
    model = AutoModelForImageClassification.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path / "model")
    processor = ViTImageProcessorPil(
        size={"height": 9, "width": 9}, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]
    )
    processor.save_pretrained(tmp_path / "model")
    assert (
        main(["inspect", "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "seen")]) == 0
    )
    assert "Their multiply-adds were not counted: " in capsys.readouterr().out
    report = json.loads((tmp_path / "seen" / "inspect.json").read_text())
    assert report["multiply_adds"] is None
    assert report["multiply_adds_uncounted"]
