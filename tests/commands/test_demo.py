"""`cap-hf demo` on its smallest scale."""

from transformers import AutoModelForImageClassification

from cap_hf.commands import demo
from cap_hf.commands.main import main


def test_demo_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "METHODS", {"CAP": "cap", "magnitude, global": "magnitude"})
    monkeypatch.setattr(demo, "SPARSITIES", (0.5, demo.SAVED, 0.98))
    arguments = ["demo", "--output_dir", str(tmp_path), "--num_train_epochs", "1", "--num_grads", "32"]
    arguments += ["--num_recovery_epochs", "1"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "predict the same" in first
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "sparsity-0.9")
    zeros = sum(int((value == 0).sum()) for name, value in loaded.state_dict().items() if ".layers." in name)
    assert zeros > 0.85 * sum(v.numel() for n, v in loaded.state_dict().items() if ".layers." in n and v.dim() == 2)
    assert main(arguments) == 0
    second = capsys.readouterr().out
    assert "Using the dense model" in second
    # The same dense model, the same seed: the same table.
    assert second.split("top-1 %")[1] == first.split("top-1 %")[1]
