"""`cap-hf inspect`: what it sees is what `cap-hf prune` reported."""

import json

from support.commands import prune

from cap_hf.commands.main import main


def test_the_zeros_are_those_of_the_report(tiny_checkpoint, tmp_path, capsys):
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.75", "--no_do_eval") == 0
    pruning = json.loads((tmp_path / "out" / "report.json").read_text())["results"][0]["pruning"]
    folder, seen = tmp_path / "out" / "sparsity-0.75", tmp_path / "seen"
    capsys.readouterr()
    assert main(["inspect", "--model_name_or_path", str(folder), "--output_dir", str(seen)]) == 0
    assert "75.00 % of them 0" in capsys.readouterr().out
    report = json.loads((seen / "inspect.json").read_text())
    assert report["num_zeros"] == pruning["num_zeros"]
    assert [layer["name"] for layer in report["layers"]] == [layer["name"] for layer in pruning["layers"]]
