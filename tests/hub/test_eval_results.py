"""Evaluation results in the Hub's own format: for benchmarks, of what was measured, and never a guess."""

import huggingface_hub
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from support.checkpoints import make_checkpoint, make_int8_checkpoints
from support.dataset_hub import DatasetHub

from cap_hf.commands.main import run as run_command
from cap_hf.hub.card import CardFacts
from cap_hf.hub.eval_results import eval_results, find_task, write_eval_results
from cap_hf.hub.publish import push_to_hub

TASKS = {
    "name": "Pictures",
    "tasks": [
        {"id": "hard", "config": "hard", "split": "test"},
        {"id": "easy", "split": "validation"},
        {"id": "pictures_test", "config": "default", "split": "test"},
    ],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, where someone/pictures is a benchmark."""
    constants = huggingface_hub.constants
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "eval.yaml").write_text(yaml.safe_dump(TASKS))
    with DatasetHub() as server:
        server.datasets["someone/pictures"] = folder
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server


def test_a_push_has_the_results_of_a_benchmark(hub, tmp_path, capsys):
    make_checkpoint(tmp_path / "m")
    push_to_hub(tmp_path / "m", "user/vit")
    content = hub.repos["user/vit"].branches["main"][".eval_results/pictures.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(content))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("someone/pictures", "pictures_test", 0.625)
    assert entry.notes == "Top-1 accuracy; 75 % of the encoder's weights are 0; 8 images"
    command = ["--model_name_or_path", str(tmp_path / "m"), "--hub_model_id", "user/vit", "--dry_run", "true"]
    for _ in range(2):  # the second one replaces the folder, with the results in it
        arguments = [*command, "--output_dir", str(tmp_path / "look"), "--overwrite_output_dir", "true"]
        assert run_command("push", arguments) == 0, capsys.readouterr().err
    assert "  .eval_results/pictures.yaml\n" in capsys.readouterr().out
    assert (tmp_path / "look" / ".eval_results" / "pictures.yaml").read_bytes() == content


@pytest.mark.parametrize(
    ("config", "split", "task"),
    [
        (None, "test", "pictures_test"),
        ("default", "test", "pictures_test"),
        ("hard", "test", "hard"),
        (None, "validation", "easy"),
        ("hard", "validation", None),
        (None, None, None),
    ],
)
def test_the_task_of_a_config_and_a_split(hub, config, split, task):
    assert find_task("someone/pictures", config, split) == task


def test_no_task_is_for_a_split_that_is_not_known(hub, tmp_path):
    (tmp_path / "pictures" / "eval.yaml").write_text("tasks: [{id: whole}]")
    assert find_task("someone/pictures", None, None) is None


@pytest.mark.parametrize("text", ["[1, 2]", "tasks: 3", "tasks: [3, {split: test}]", "{", ""])
def test_a_list_of_tasks_that_is_none(hub, tmp_path, text):
    (tmp_path / "pictures" / "eval.yaml").write_text(text)
    assert find_task("someone/pictures", None, "test") is None


def test_a_dataset_that_is_no_benchmark_or_not_on_the_hub(hub, tmp_path):
    (tmp_path / "pictures" / "eval.yaml").unlink()
    make_checkpoint(tmp_path / "m")
    facts = CardFacts.gather(tmp_path / "m", "user/vit")
    assert eval_results(facts) == []
    write_eval_results(tmp_path / "m", facts)
    assert not (tmp_path / "m" / ".eval_results").exists()
    (tmp_path / "pictures" / "eval.yaml").write_text(yaml.safe_dump(TASKS))
    assert len(eval_results(facts)) == 1
    for changes in ({"dataset_name": "digits"}, {"dataset_name": str(tmp_path)}, {"dataset_name": None}):
        make_checkpoint(tmp_path / "m", facts={"data": changes | {"eval_split_name": "test"}})
        assert eval_results(CardFacts.gather(tmp_path / "m", "user/vit")) == []
    make_checkpoint(tmp_path / "m", facts={"sparse": {"knn_top1": 0.5, "loss": 1.0}})
    assert eval_results(CardFacts.gather(tmp_path / "m", "user/vit")) == []


def test_the_token_of_a_push_reads_the_tasks_too(hub, tmp_path, monkeypatch, capsys):
    make_checkpoint(tmp_path / "m")
    tokens = []

    def download(*args, token, **kwargs):
        tokens.append(token)
        return str(tmp_path / "pictures" / "eval.yaml")

    monkeypatch.setattr("cap_hf.hub.eval_results.hf_hub_download", download)
    push_to_hub(tmp_path / "m", "user/vit", token="hf_writer")
    command = ["--model_name_or_path", str(tmp_path / "m"), "--hub_model_id", "user/vit", "--token", "hf_mine"]
    look = ["--dry_run", "true", "--output_dir", str(tmp_path / "look")]
    assert run_command("push", [*command, *look]) == 0, capsys.readouterr().err
    assert tokens == ["hf_writer", "hf_mine"]


def test_why_tasks_cannot_be_read_is_said_unless_there_are_none(hub, tmp_path, monkeypatch, capsys):
    assert find_task("someone/nothing", None, "test") is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_task("someone/other", None, "test") is None
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "pictures" / "eval.yaml").write_text("{")
    assert find_task("someone/pictures", None, "test") is None
    said = capsys.readouterr().err
    assert said.startswith("no .eval_results: eval.yaml of someone/pictures cannot be read: ")
    assert said.count("\n") == 1


def test_a_part_of_a_split_is_no_result_of_a_benchmark(hub, tmp_path):
    data = {"dataset_name": "someone/pictures", "eval_split_name": "test"}
    for limit, count in ((None, 1), (8, 0)):
        make_checkpoint(tmp_path / "m", facts={"data": data | {"max_eval_samples": limit}})
        assert len(eval_results(CardFacts.gather(tmp_path / "m", "user/vit"))) == count


def test_what_was_measured_before_rounding_is_not_a_result_of_int8(hub, tmp_path):
    make_int8_checkpoints(tmp_path)
    facts = [CardFacts.gather(tmp_path / name, "user/vit") for name in ("plain", "int8")]
    assert [len(eval_results(each)) for each in facts] == [1, 0]
    assert [each.metadata().base_model_relation for each in facts] == ["finetune", "quantized"]
