"""`cap-hf compress`, and what `cap-hf inspect` and `push` say of what it wrote."""

import json

import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint

from cap_hf.commands.main import run as run_command


def test_compress_and_inspect_commands(tmp_path, capsys):
    model = make_checkpoint(tmp_path / "m")
    arguments = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir"]
    assert run_command("compress", [*arguments, str(tmp_path / "c")]) == 0
    assert "bytes of weights" in capsys.readouterr().out
    assert run_command("compress", [*arguments, str(tmp_path / "c")]) == 1
    assert "exists" in capsys.readouterr().err
    assert run_command("inspect", ["--model_name_or_path", str(tmp_path / "c"), "--output_dir", str(tmp_path)]) == 0
    assert "those of its report" in capsys.readouterr().out
    # As many zeros as before, one of them in another place.
    weights = model.vit.layers[1].mlp.fc2.weight.detach().view(-1)
    zero, other = int((weights == 0).nonzero()[0]), int((weights != 0).nonzero()[0])
    weights[zero], weights[other] = weights[other].clone(), 0
    model.save_pretrained(tmp_path / "m")
    assert run_command("inspect", [*arguments, str(tmp_path)]) == 0
    assert "NOT those of its report in vit.layers.1.mlp.fc2\n" in capsys.readouterr().out
    assert run_command("push", [*arguments, str(tmp_path / "p"), "--hub_model_id", "a/b", "--dry_run"]) == 1
    assert "is not about these weights (vit.layers.1.mlp.fc2 has other zeros)" in capsys.readouterr().err
    assert run_command("compress", ["--model_name_or_path", "no/where", "--output_dir", str(tmp_path / "d")]) == 1
    assert capsys.readouterr().err.startswith("cap-hf compress: no/where is no folder and cannot be downloaded: ")


def test_compress_tells_of_zeros_with_a_sign(tmp_path, capsys):
    model = make_checkpoint(tmp_path / "m")
    weight = model.vit.layers[0].mlp.fc1.weight
    zeros = (weight == 0).nonzero()
    weight.data[zeros[:7, 0], zeros[:7, 1]] = -0.0
    model.save_pretrained(tmp_path / "m")
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "c")]
    assert run_command("compress", command) == 0
    assert "\n7 zeros are -0.0" in capsys.readouterr().out
    weight.data[weight == 0] = 0
    model.save_pretrained(tmp_path / "m")
    assert run_command("compress", [*command, "--overwrite_output_dir", "true"]) == 0
    assert "-0.0" not in capsys.readouterr().out


def lacking(folder, tensors):
    del tensors["vit.layernorm.weight"]


def prefixed(folder, tensors):
    for name in list(tensors):
        tensors["module." + name] = tensors.pop(name)


def adapted(folder, tensors):
    (folder / "adapter_config.json").write_text("{}")


def reshaped(folder, tensors):
    tensors["classifier.bias"] = tensors["classifier.bias"][:2].clone()


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lacking, "has no weights for vit.layernorm.weight"),
        (prefixed, "begin with 'module.'"),
        (adapted, "has an adapter"),
        (reshaped, "has a head of 2 classes"),
    ],
)
def test_what_no_command_can_load_is_not_compressed(spoil, line, tmp_path, capsys):
    make_checkpoint(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    spoil(tmp_path / "m", tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "c")]
    assert run_command("compress", command) == 1
    assert line in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_model_that_cannot_be_built_here_is_compressed_unseen(tmp_path, capsys, caplog):
    """Its package is not installed, or its code may not run."""
    make_checkpoint(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "own.py").write_text("")
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "c")]
    assert run_command("compress", command) == 0
    assert "It was not checked whether all weights are there: " in caplog.text
    assert (tmp_path / "c" / "own.py").is_file()
