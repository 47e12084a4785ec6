"""`cap-hf report` and `--report true` as a user meets them: a page of what was run, and nothing else is touched."""

import json
from pathlib import Path

import pytest
import torch
from support.commands import prune
from support.finetuning import finetune
from support.runs import benchmark, report, write, write_run
from transformers import AutoModelForImageClassification

from cap_hf.commands.main import main


@pytest.fixture
def lively(tiny_checkpoint):
    """The tiny checkpoint with weights so large that it takes images for different things."""
    model = AutoModelForImageClassification.from_pretrained(tiny_checkpoint)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tiny_checkpoint)
    return tiny_checkpoint


def test_a_page_of_what_was_run(tmp_path, capsys):
    write_run(tmp_path)
    write(tmp_path / "sparsity-0.9" / "benchmark.json", benchmark())
    assert main(["report", "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"The page is {tmp_path / 'report.html'}\n"
    assert (tmp_path / "report" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    # As often as one likes.
    assert main(["report", "--output_dir", str(tmp_path)]) == 0


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert main(["report", "--output_dir", str(tmp_path)]) == 1
    assert "holds no report.json, benchmark.json or trainer_state.json of a run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_prune_ends_with_its_page(lively, tmp_path, capsys):
    output = tmp_path / "out"
    assert prune(lively, output, "--sparsity", "0.5", "0.95", "--report", "true") == 0
    assert f"The page is {output / 'report.html'}" in capsys.readouterr().out
    noted = json.loads((output / "report" / "recorded.json").read_text())
    assert noted["command"].startswith(f"cap-hf prune --model_name_or_path {lively} ")
    layers = [
        layer["name"] for layer in json.loads((output / "report.json").read_text())["results"][0]["pruning"]["layers"]
    ]
    assert list(noted["curve"]["layers"]) == layers
    assert 1 <= len(noted["spectra"]) <= 6
    assert list(noted["changed"]) == ["sparsity-0.5", "sparsity-0.95"]
    changed = noted["changed"]["sparsity-0.95"]
    assert changed["images"] == 50
    assert 0 < len(changed["shown"]) <= min(24, changed["changed"])
    text = (output / "report.html").read_text()
    assert all(chart in text for chart in ('id="accuracy"', 'id="sparsity-map"', 'id="next-removal"', 'id="spectrum"'))
    assert changed["shown"][0]["image"] in text
    # Images of the data stay beside the checkpoints: nothing of them is in what is published.
    for folder in (output / "sparsity-0.5", output):
        assert "data:image" not in (folder / "report.json").read_text()


def test_changed_predictions_are_those_of_the_saved_models(lively, tmp_path):
    """The same images through the checkpoints, loaded again, one by one."""
    from cap_hf.commands.arguments import ModelArguments
    from cap_hf.commands.common import image_dataset, load_all
    from cap_hf.data.arguments import DataArguments

    output = tmp_path / "out"
    assert prune(lively, output, "--sparsity", "0.95", "--report", "true", "--refit", "false") == 0
    changed = json.loads((output / "report" / "recorded.json").read_text())["changed"]["sparsity-0.95"]
    arguments = DataArguments(max_eval_samples=50)
    model, image_processor, splits = load_all(ModelArguments(str(lively)), arguments, 42, ["eval"])
    dataset = image_dataset(splits["eval"], image_processor, model, arguments)
    sparse = AutoModelForImageClassification.from_pretrained(output / "sparsity-0.95").eval()
    with torch.no_grad():
        found = [
            [int(each(dataset[index]["pixel_values"][None]).logits.argmax()) for each in (model, sparse)]
            for index in range(50)
        ]
    assert 0 < changed["changed"] == sum(before != after for before, after in found)
    for shown in changed["shown"]:
        before, after = (sparse.config.id2label[number] for number in found[shown["example"]])
        assert (shown["dense"], shown["sparse"]) == (before, after)
        assert shown["label"] == sparse.config.id2label[int(dataset[shown["example"]]["labels"])]


def test_a_page_is_of_the_last_run(tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    assert prune(tiny_checkpoint, output, "--sparsity", "0.5", "--report", "true", "--do_eval", "false") == 0
    again = ("--sparsity", "0.5", "--overwrite_output_dir", "--method", "magnitude")
    assert prune(tiny_checkpoint, output, *again) == 0
    assert main(["report", "--output_dir", str(output)]) == 0
    text = (output / "report.html").read_text()
    assert "is of another run than report.json and was left out" in text
    assert 'id="next-removal"' not in text


def test_what_sums_nothing_has_a_page_too(tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    arguments = ("--sparsity", "0.5", "--method", "magnitude", "--report", "true")
    assert prune(tiny_checkpoint, output, *arguments) == 0
    noted = json.loads((output / "report" / "recorded.json").read_text())
    assert noted["spectra"] == []
    assert noted["curve"]["sparsity"]


def test_a_recovery_ends_with_its_page(folders, tmp_path, capsys):
    student, teacher = folders
    output = tmp_path / "recovered"
    arguments = ("--teacher_model_name_or_path", str(teacher), "--report", "true", "--logging_steps", "1")
    assert finetune(student, output, *arguments) == 0
    assert f"The page is {output / 'report.html'}" in capsys.readouterr().out
    text = (output / "report.html").read_text()
    assert all(f'id="{chart}"' in text for chart in ("accuracy", "training-loss", "learning-rate", "sparsity-map"))
    noted = json.loads((output / "report" / "recorded.json").read_text())
    assert noted["changed"]["recovered"]["images"] == 60
    # The page is no part of the checkpoint: it is not published, and does not stand in the way of the next run.
    published = tmp_path / "published"
    assert (
        main(
            [
                "push",
                "--model_name_or_path",
                str(output),
                "--hub_model_id",
                "user/name",
                "--dry_run",
                "true",
                "--output_dir",
                str(published),
            ]
        )
        == 0
    )
    assert not {"report", "report.html"} & {path.name for path in published.iterdir()}
    assert finetune(student, output, *arguments, "--overwrite_output_dir") == 0


def test_trackers_of_a_prune_have_its_figures(tiny_checkpoint, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "out"
    arguments = ("--sparsity", "0.5", "0.9", "--report_to", "tensorboard", "--token", "hf_" + "a1" * 20)
    assert prune(tiny_checkpoint, output, *arguments) == 0
    assert sorted(path.name for path in output.iterdir()) == ["report.json", "sparsity-0.5", "sparsity-0.9"]
    logs = Path(f"{output}-runs")
    events = accumulator.EventAccumulator(str(logs / "cap_hf"))
    events.Reload()
    saved = json.loads((output / "report.json").read_text())
    found = {event.step: event.value for event in events.Scalars("measured/top1")}
    assert found == {
        0: pytest.approx(saved["dense"]["top1"]),
        500: pytest.approx(saved["results"][0]["sparse"]["top1"]),
        900: pytest.approx(saved["results"][1]["sparse"]["top1"]),
    }
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("seconds/")} >= {
        "seconds/load",
        "seconds/collect",
        "seconds/prune 0.9",
    }
    assert all(b"a1a1" not in path.read_bytes() for path in logs.rglob("*") if path.is_file())


def test_a_page_can_be_made_of_reports_of_any_time(tmp_path):
    content = report()
    for result in content["results"]:  # as versions before this one have written them
        del result["healing"], result["steps"], result["pruning"]["pattern"]
    del content["sparsity_dense"], content["num_processes"]
    write_run(tmp_path, content)
    assert main(["report", "--output_dir", str(tmp_path)]) == 0
