"""What is measured of a model is chosen by its head and by the labels of the images."""

import json
import shutil

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from support.backbones import backbone_checkpoint
from support.commands import image_folder, prune

from cap_hf.commands.arguments import ModelArguments
from cap_hf.commands.common import load_all
from cap_hf.commands.evaluation import Evaluation
from cap_hf.commands.main import main
from cap_hf.data.arguments import DataArguments
from cap_hf.errors import CAPError


def make(folder, data_args, bank_size):
    model, processor, splits = load_all(ModelArguments(str(folder)), data_args, 1, ["eval"], bank_size=bank_size)
    return model, Evaluation(model, splits, processor, data_args, 32, Accelerator(), True)


def test_what_is_measured(tiny_checkpoint, tmp_path):
    few = DataArguments(max_eval_samples=20)
    plain = DataArguments(str(image_folder(tmp_path / "plain", ("train", "test"), ("",))))
    backbone = backbone_checkpoint(tmp_path / "backbone")
    accuracy = {f"{name}{end}" for name in ("top1", "top5", "loss") for end in ("", "_se")}
    features = {"cosine", "cosine_p5", "cosine_se"}
    probes = {f"{probe}{end}" for probe in ("knn_top1", "linear_top1") for end in ("", "_se")} | {"bank_examples"}
    for folder, data_args, bank_size, alone, compared in (
        (tiny_checkpoint, few, 40, accuracy, accuracy),
        (tiny_checkpoint, plain, 40, None, features),
        (backbone, few, 40, probes, probes | features | {"patch_error"}),
        (backbone, few, 0, None, features | {"patch_error"}),
        (backbone, plain, 40, None, features | {"patch_error"}),
    ):
        model, evaluation = make(folder, data_args, bank_size)
        if alone is None:
            with pytest.raises(CAPError, match="--dense_model_name_or_path"):
                evaluation.check_alone()
        else:
            evaluation.check_alone()
            assert evaluation.measure(model).keys() == alone | {"num_examples"}
        # The dense model's cosine to itself is no estimate.
        assert evaluation.measure_dense(model).keys() == compared - {"cosine_se"} | {"num_examples"}
        estimates = compared - {"cosine", "cosine_p5", "patch_error", "bank_examples"}
        drops = {f"{name}_drop_se" for name in estimates if not name.endswith("_se")}
        assert evaluation.measure(model).keys() == compared | drops | {"num_examples"}


def test_names_of_classes_are_the_same_in_the_bank_and_in_what_is_asked(tmp_path):
    """A class that the evaluated images lack moved the numbers of those after it, and k-NN found nothing."""
    shades, features = (
        {"a": 0, "b": 128, "c": 255},
        datasets.Features(image=datasets.Image(), label=datasets.Value("string")),
    )
    for split, names in (("train", "abc" * 10), ("test", "bc" * 8)):
        images = [Image.fromarray(np.full((8, 8), shades[name], np.uint8)) for name in names]
        rows = datasets.Dataset.from_dict({"image": images, "label": list(names)}, features=features)
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    model, evaluation = make(backbone_checkpoint(tmp_path / "m"), DataArguments(str(tmp_path / "data")), 30)
    found = evaluation.measure(model)
    assert (found["knn_top1"], found["linear_top1"]) == (1, 1)


@pytest.mark.parametrize("change", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}])
def test_models_that_pick_no_label_of_several(tiny_checkpoint, tmp_path, change, capsys):
    """Their softmax says nothing: no accuracy is made of it, and no gradient."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    name, task = ["--model_name_or_path", str(folder)], change["problem_type"]
    for command, advice in (
        ("evaluate", "load it in Python with from_pretrained, and measure it with a metric of that task"),
        ("finetune", "SparseTrainer"),
        ("prune", "--do_eval false"),
    ):
        sparsity = ["--sparsity", "0.5"] if command == "prune" else []
        assert main([command, *name, "--output_dir", str(tmp_path / command), *sparsity]) == 1
        said = capsys.readouterr().err
        assert f"for models that pick one label of several, and ViTForImageClassification is for {task}" in said
        assert advice in said
        assert ("--do_eval" in said) == (command == "prune")
        assert not (tmp_path / command).exists()
    assert prune(folder, tmp_path / "pruned", "--sparsity", "0.5", "--do_eval", "false") == 0
    assert json.loads((tmp_path / "pruned" / "report.json").read_text())["config"]["fisher_loss"] == "features"
