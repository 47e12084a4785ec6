"""`cap-hf report` and `--report true` as a user meets them: a page of what was run, and nothing else is touched."""

import html
import json
from pathlib import Path

import pytest
import torch
from support.backbones import backbone_checkpoint
from support.commands import prune
from support.finetuning import finetune
from support.launching import dense_checkpoint
from support.runs import benchmark, report, write, write_run
from transformers import AutoModelForImageClassification

import cap_hf.collection.planning as planning
import cap_hf.collection.solver as solver
from cap_hf.commands.main import main
from cap_hf.pages.accuracy_chart import accuracy_chart
from cap_hf.pages.runs import find_runs


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


def text_of(output: Path) -> str:
    """What a page says, without marks of HTML."""
    return html.unescape((output / "report.html").read_text())


def test_a_page_tells_the_last_run_from_what_an_earlier_one_has_left(tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    assert prune(tiny_checkpoint, output, "--sparsity", "0.5", "0.7", "--report", "true") == 0
    again = ("--sparsity", "0.5", "--overwrite_output_dir", "--method", "magnitude", "--max_eval_samples", "40")
    assert prune(tiny_checkpoint, output, *again) == 0
    assert main(["report", "--output_dir", str(output)]) == 0
    text = text_of(output)
    assert "is of another run than report.json and was left out" in text
    assert 'id="next-removal"' not in text
    assert "sparsity-0.7 is of an earlier run into the same folder, which report.json there does not tell of." in text
    assert "sparsity-0.7 (an earlier run)" in text
    # Measured on other images, and compared with the dense model as it was measured on these.
    found = find_runs(output)
    old, new = (next(each for each in found.models if each.name == f"sparsity-{part}") for part in ("0.7", "0.5"))
    assert (old.series, old.dense["num_examples"]) == ("cap, 50 images, an earlier run", 50)
    assert (new.series, new.dense["num_examples"]) == ("magnitude, 40 images", 40)
    chart = accuracy_chart(found)
    drops = {each["model"]: each["drop"] for each in chart.spec["data"]["values"] if each["model"] != "dense"}
    for model in (old, new):
        assert drops[model.name] == pytest.approx(100 * (model.dense["top1"] - model.metrics["top1"]))


def test_runs_of_two_models_are_told_apart(tiny_checkpoint, tmp_path):
    """Two seeds of one ViT: on a few images both may well be right as often."""
    other = tmp_path / "other"
    torch.manual_seed(1)
    model = AutoModelForImageClassification.from_pretrained(tiny_checkpoint)
    model.classifier.weight.data.normal_()
    model.save_pretrained(other)
    for file in tiny_checkpoint.glob("preprocessor_config.json"):
        (other / file.name).write_bytes(file.read_bytes())
    for dense, name in ((tiny_checkpoint, "a"), (other, "b")):
        assert prune(dense, tmp_path / "out" / name, "--sparsity", "0.5", "--method", "magnitude") == 0
    found = find_runs(tmp_path / "out")
    assert [model.series for model in found.models] == ["magnitude, dense", "magnitude, other"]
    assert main(["report", "--output_dir", str(tmp_path / "out")]) == 0
    assert "(dense; other)" in text_of(tmp_path / "out")


def test_of_a_backbone_in_a_pattern_it_is_said_what_there_cannot_be(tmp_path):
    dense, output = backbone_checkpoint(tmp_path / "dense"), tmp_path / "out"
    arguments = ("--allocation", "2:4", "--report", "true", "--knn_bank_size", "60")
    assert prune(dense, output, *arguments) == 0
    text = text_of(output)
    assert "Elimination is not here: 2:4 compares nothing between blocks." in text
    assert "Changed predictions are not here: the model has no head" in text
    assert all(f'id="{chart}"' in text for chart in ("accuracy", "sparsity-map", "spectrum"))
    assert "k-NN %" in text
    assert 'id="next-removal"' not in text


@pytest.mark.parametrize("place", ["disk", "nowhere"])
def test_sums_of_several_passes_have_a_spectrum_where_they_are_kept(tmp_path, monkeypatch, place):
    monkeypatch.setattr(solver, "BATCH_BYTES", 2**13)
    monkeypatch.setattr(planning, "available_bytes", lambda *_: 320_000)
    monkeypatch.setattr(planning, "extra_seconds", lambda plan, *_: float(plan.recollects != (place == "nowhere")))
    arguments = ["--spill_dir", str(tmp_path / "spill") if place == "disk" else "none", "--report", "true"]
    arguments += ["--per_device_batch_size", "4", "--refit", "false", "--do_eval", "false", "--sparsity", "0.5"]
    assert prune(dense_checkpoint(tmp_path / "vit"), tmp_path / "out", *arguments) == 0
    text = text_of(tmp_path / "out")
    assert ('id="spectrum"' in text) == (place == "disk")
    assert ("collected in several passes and not kept" in text) == (place == "nowhere")
    assert "Changed predictions are not here: nothing was measured" in text
    assert 'id="next-removal"' in text


def test_what_sums_nothing_has_a_page_too(tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    arguments = ("--sparsity", "0.5", "--method", "magnitude", "--report", "true")
    assert prune(tiny_checkpoint, output, *arguments) == 0
    noted = json.loads((output / "report" / "recorded.json").read_text())
    assert noted["spectra"] == []
    assert noted["curve"]["sparsity"]
    assert "Fisher is not here: method magnitude sums nothing." in text_of(output)


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
