"""`cap-hf prune --max_accuracy_drop`: what it holds out, what it measures, what it writes."""

import json

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.neighbors import NearestNeighbors
from support.backbones import backbone_checkpoint
from support.checkpoints import assert_same_weights
from support.commands import image_folder, prune
from support.launching import dense_checkpoint, launch
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from cap_hf import CAPCompressor
from cap_hf.commands import preparing
from cap_hf.commands.arguments import ModelArguments
from cap_hf.commands.common import image_dataset, load_all
from cap_hf.commands.main import main
from cap_hf.commands.searching import HeldOut, choose_metric, conclusion, hold_out, teller
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import calibration_split, collate
from cap_hf.errors import CAPError
from cap_hf.outputs import features_of
from cap_hf.report import Evaluated, SearchReport
from cap_hf.towers import prefix_tokens

SEARCH = ("--max_accuracy_drop", "0.02", "--sparsity_step", "0.05", "--max_search_samples", "300")


def numbers(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"number": list(range(count))})


@pytest.mark.parametrize(("total", "calibration", "count"), [(1000, 200, 300), (400, 200, 300), (300, 200, 100)])
def test_what_is_held_out_is_no_calibration_example(monkeypatch, total, calibration, count):
    split = numbers(total)
    held, others = hold_out(split, calibration, count, 7)
    calibrating = set(calibration_split(split, calibration, 7)["number"])
    assert len(held) == min(count, total - calibration)
    assert not calibrating & set(held["number"])
    assert sorted([*held["number"], *others["number"]]) == list(range(total))
    # Those that no gradient came from are the first that k-NN takes.
    assert set(others["number"][-calibration:]) == calibrating


def test_too_few_images_to_search_with_are_one_line():
    with pytest.raises(CAPError, match="beside 200 calibration examples 99 train images are left to search with, of"):
        hold_out(numbers(299), 200, 2000, 0)
    with pytest.raises(CAPError, match="raise --max_search_samples"):
        hold_out(numbers(1000), 200, 99, 0)


def test_the_metric_goes_by_the_model_and_its_data(tiny_vit, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    backbone = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1))
    assert choose_metric(None, tiny_vit, True, 0) == "top1"
    assert choose_metric(None, tiny_vit, False, 5000) == "cosine"
    assert choose_metric(None, backbone, True, 5000) == "knn"
    assert choose_metric(None, backbone, True, 19) == "cosine"
    assert choose_metric(None, backbone, False, 5000) == "cosine"
    for asked in ("top1", "loss", "cosine"):
        assert choose_metric(asked, tiny_vit, True, 0) == asked
    assert choose_metric("knn", tiny_vit, True, 20) == "knn"
    for asked, model, labelled, bank, line in (
        ("top1", backbone, True, 5000, "max_drop_metric=top1 needs a head, and Dinov2Model has none"),
        ("loss", tiny_vit, False, 5000, "max_drop_metric=loss needs images with labels, and these have none"),
        ("knn", backbone, False, 5000, "max_drop_metric=knn needs images with labels"),
        ("knn", backbone, True, 19, "asks the nearest 20 of 19 train images: raise --knn_bank_size"),
    ):
        with pytest.raises(CAPError, match=line):
            choose_metric(asked, model, labelled, bank)
    tiny_vit.config.problem_type = "multi_label_classification"
    with pytest.raises(CAPError, match="max_drop_metric=top1 is for models that pick one label of several"):
        choose_metric("top1", tiny_vit, True, 0)


def held_out(folder, asked, bank_size=40):
    data_args = DataArguments()
    model, processor, splits = load_all(ModelArguments(str(folder)), data_args, 1, ["train"])
    held, others = hold_out(splits["train"], 50, 120, 1)
    scores = HeldOut(asked, model, held, others, bank_size, processor, data_args, 32, Accelerator(), True)
    images, bank = (
        image_dataset(split, processor, model, data_args) for split in (held, others.select(range(bank_size)))
    )
    return model, scores, *(collate([dataset[index] for index in range(len(dataset))]) for dataset in (images, bank))


def test_each_image_is_scored_as_by_hand(tiny_checkpoint, tmp_path):
    for asked in ("top1", "loss"):
        model, scores, images, _ = held_out(tiny_checkpoint, asked)
        with torch.no_grad():
            logits = model(images["pixel_values"]).logits
        hits = logits.argmax(dim=1) == images["labels"]
        losses = F.cross_entropy(logits.double(), images["labels"], reduction="none")
        torch.testing.assert_close(
            scores(model).double(), hits.double() if asked == "top1" else -losses, rtol=1e-5, atol=0
        )
        assert (scores.metric, scores.num_read) == (asked, 120)
    backbone = backbone_checkpoint(tmp_path / "backbone")

    def vectors(model, batch) -> torch.Tensor:
        with torch.no_grad():
            return features_of(model(batch["pixel_values"]), prefix_tokens(model))["pooled"][:, 0]

    model, scores, images, bank = held_out(backbone, None)
    assert (scores.metric, scores.num_read) == ("knn", 160)
    known, asked = (F.normalize(vectors(model, each), dim=1).numpy() for each in (bank, images))
    distances, nearest = NearestNeighbors(n_neighbors=20).fit(known).kneighbors(asked)
    votes = np.zeros((120, 10))
    for row, (gaps, places) in enumerate(zip(distances, nearest, strict=True)):
        for gap, place in zip(gaps, places, strict=True):
            votes[row, bank["labels"][place]] += np.exp((1 - gap**2 / 2) / 0.07)
    # But for neighbours that are as near as rounding tells.
    agreed = (votes.argmax(axis=1) == images["labels"].numpy()) == scores(model).numpy()
    assert agreed.mean() > 0.97

    model, scores, images, _ = held_out(backbone, "cosine")
    dense = vectors(model, images)
    assert torch.allclose(scores(model), torch.ones(120, dtype=torch.float64))
    with torch.no_grad():
        model.encoder.layer[0].mlp.fc1.weight.mul_(3.0)
    expected = F.cosine_similarity(vectors(model, images), dense, dim=1).double()
    assert expected.max() < 1 - 1e-4
    torch.testing.assert_close(scores(model), expected, rtol=1e-5, atol=0)


def test_lines_of_a_search(capsys):
    tell = teller("top1", 5)
    tell(Evaluated(0.5, 0.8, 0.0123, 0.004, True, 1.0))
    tell(Evaluated(0.75, 0.7, 0.1123, None, False, 1.0))
    assert capsys.readouterr().out.splitlines() == [
        "search 1 of at most 5: sparsity 0.5 loses 0.0123 ± 0.0040 of top-1: kept",
        "search 2 of at most 5: sparsity 0.75 loses 0.1123 of top-1: too much",
    ]
    evaluations = [Evaluated(0.5, 0.8, 0.0123, 0.004, True, 1.0), Evaluated(0.525, 0.7, 0.03, 0.005, False, 1.0)]
    report = SearchReport(0.02, 0.025, 0.9, 1000, evaluations, 0.5, True)
    assert conclusion(report, "top1", True).splitlines() == [
        "Sparsity 0.5 loses 0.0123 ± 0.0040 of top-1 on 1000 train images that were held out, and 0.02 was allowed.",
        "Sparsity 0.525 loses 0.0300 ± 0.0050.",
        "Both as they were before healing.",
    ]


def test_the_checkpoint_is_that_of_the_sparsity_that_was_found(tmp_path, capsys):
    dense, output = dense_checkpoint(tmp_path / "dense"), tmp_path / "found"
    assert prune(dense, output, *SEARCH) == 0
    printed = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    search = report["search"]
    name = f"sparsity-{search['sparsity']:g}"
    assert sorted(path.name for path in output.iterdir()) == ["report.json", name]
    assert name in printed
    assert [line.startswith("search ") for line in printed.splitlines()].count(True) == len(search["evaluations"])
    assert (search["metric"], search["max_drop"], search["num_examples"]) == ("top1", 0.02, 300)
    assert search["complete"]
    kept = [each["sparsity"] for each in search["evaluations"] if each["kept"]]
    assert max(kept) == search["sparsity"]
    refused = [each["sparsity"] for each in search["evaluations"] if not each["kept"]]
    assert min(refused) == pytest.approx(search["sparsity"] + 0.05)
    assert all(each["drop_se"] > 0 for each in search["evaluations"])
    assert {"load", "collect", "evaluate dense", "search", f"evaluate {search['sparsity']:g}"} == {
        phase["phase"] for phase in report["phases"]
    }
    (result,) = report["results"]
    assert result["pruning"]["refit"]["examples"] == 256
    assert json.loads((output / name / "report.json").read_text())["search"] == search
    # A plain prune to it gives the same, to the bit: the calibration examples are the same.
    assert prune(dense, tmp_path / "plain", "--sparsity", str(search["sparsity"])) == 0
    load = AutoModelForImageClassification.from_pretrained
    assert_same_weights(load(output / name), load(tmp_path / "plain" / name))
    plain = json.loads((tmp_path / "plain" / "report.json").read_text())
    assert plain["results"][0]["sparse"] == result["sparse"]
    assert "search" not in plain


def test_what_was_found_is_healed_once_on_other_images(tmp_path, monkeypatch, capsys):
    dense, output, seen = dense_checkpoint(tmp_path / "dense"), tmp_path / "healed", {}

    def noting(*args):
        seen["held"], seen["others"] = hold_out(*args)
        return seen["held"], seen["others"]

    monkeypatch.setattr(preparing, "hold_out", noting)
    healing = preparing.Healing
    monkeypatch.setattr(
        preparing,
        "Healing",
        lambda model, images, *rest: (seen.update(images=images), healing(model, images, *rest))[1],
    )
    assert prune(dense, output, *SEARCH, "--heal_steps", "3", "--heal_batch_size", "4") == 0
    assert len(seen["images"]) == len(seen["others"]) == 1347 - 300
    report = json.loads((output / "report.json").read_text())
    assert [phase["phase"] for phase in report["phases"]].count(f"heal {report['search']['sparsity']:g}") == 1
    assert report["results"][0]["healing"]["steps"] == 3
    assert "Both as they were before healing." in capsys.readouterr().out


def test_a_backbone_and_images_without_labels(tmp_path, capsys):
    backbone = backbone_checkpoint(tmp_path / "backbone")
    data = image_folder(tmp_path / "data", ("train", "test"), tuple(map(str, range(150))))
    few = ("--num_grads", "16", "--refit_examples", "16", "--knn_bank_size", "60", "--max_accuracy_drop", "0.5")
    assert prune(backbone, tmp_path / "knn", *few, "--max_search_samples", "200") == 0
    search = json.loads((tmp_path / "knn" / "report.json").read_text())["search"]
    assert (search["metric"], search["num_examples"]) == ("knn", 200)
    unlabelled = ("--dataset_name", str(data), "--label_column_name", "none")
    for path in list((data / "train").iterdir()):
        (path / "0.png").rename(data / "train" / f"{path.name}.png")
        path.rmdir()
    for path in list((data / "test").iterdir()):
        (path / "0.png").rename(data / "test" / f"{path.name}.png")
        path.rmdir()
    assert prune(backbone, tmp_path / "cosine", *few, *unlabelled[:2]) == 0
    search = json.loads((tmp_path / "cosine" / "report.json").read_text())["search"]
    assert (search["metric"], search["num_examples"], search["dense"]) == ("cosine", 134, pytest.approx(1.0))
    assert prune(backbone, tmp_path / "top1", *few, "--max_drop_metric", "top1") == 1
    assert "max_drop_metric=top1 needs a head, and Dinov2Model has none" in capsys.readouterr().err


def test_nothing_is_written_where_no_sparsity_keeps_the_drop(tiny_checkpoint, tmp_path, capsys):
    arguments = ("--max_drop_metric", "cosine", "--max_accuracy_drop", "0", "--sparsity_step", "0.3")
    assert prune(tiny_checkpoint, tmp_path / "out", *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cap-hf prune: even sparsity 0.3 loses 0.")
    assert error.endswith("and 0 is allowed: allow more")
    assert not (tmp_path / "out").exists()


def test_too_few_train_images_are_named_before_the_collection(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CAPCompressor, "collect", None)
    few = ("--max_accuracy_drop", "0.1", "--max_train_samples", "300")
    assert prune(tiny_checkpoint, tmp_path / "out", *few) == 1
    assert "beside 256 calibration examples 44 train images are left to search with" in capsys.readouterr().err


def test_a_dry_run_counts_the_models_of_a_search(tiny_checkpoint, tmp_path, capsys):
    assert prune(tiny_checkpoint, tmp_path / "out", *SEARCH, "--dry_run", "true") == 0
    assert capsys.readouterr().out.splitlines()[0].split()[-2:] == ["evaluate", "together"]
    assert not (tmp_path / "out").exists()


def test_two_processes_find_what_one_does(tmp_path):
    dense = str(dense_checkpoint(tmp_path / "dense"))
    common = ["--model_name_or_path", dense, *SEARCH, "--method", "magnitude", "--do_eval", "false", "--disable_tqdm"]
    done = launch(2, *common, "--output_dir", str(tmp_path / "two"))
    assert done.stdout.count("search 1 of at most 8") == 1
    assert main(["prune", *common, "--output_dir", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["search"] for name in ("one", "two"))
    for report in (one, two):
        for each in report["evaluations"]:
            del each["seconds"]
    assert one == two
