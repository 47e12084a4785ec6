"""The card says what was measured, nothing else, and names cannot break it."""

import builtins
import json
import re

import pytest
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from support.backbones import clip_checkpoint, tiny_dinov2
from support.checkpoints import make_checkpoint, make_custom_checkpoint, make_processor

from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.hub.card import CardFacts, base_license

NASTY = 'it\'s "x": {{ 1337 * 1337 }} {% if %} <script>alert(1)</script> | `a` [b](c)\n---\nlicense: evil\n\u2028# head'


def render(folder, repo_id="user/small-vit", **kwargs):
    return CardFacts.gather(folder, repo_id, **kwargs).render()


def test_metadata_and_text(tmp_path):
    make_checkpoint(tmp_path / "m", 0.75)
    card = render(tmp_path / "m", license="apache-2.0")
    data = card.data.to_dict()
    assert data["base_model"] == "someone/dense-vit"
    assert data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "image-classification"
    assert data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["someone/pictures"]
    assert {"sparse", "pruned", "magnitude", "sparsity-75", "unstructured"} <= set(data["tags"])
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "small-vit"
    assert [(result.metric_type, result.metric_value, result.dataset_split) for result in results] == [
        ("accuracy", 0.625, "test")
    ]
    content = card.content
    for said in (
        "| top-1 accuracy % | 75.00 | 62.50 |",
        "cap-hf prune --model_name_or_path someone/dense-vit",
        "Seed: 42",
    ):
        assert said in content
    assert "top-5" not in content.lower()  # was not measured
    assert "2210.09223" not in content  # was not pruned with CAP
    assert content.count("| vit.layers.") == 12
    assert 'pipeline("image-classification", model="user/small-vit")' in content
    assert ModelCard(str(card)).data.to_dict() == data


def test_patterns_and_compressed_checkpoints(tmp_path):
    make_checkpoint(tmp_path / "m", None, compressed=True, allocation="2:4")
    card = render(tmp_path / "m")
    assert "2:4" in card.data.tags
    assert "import cap_hf\nfrom transformers" in card.content
    assert "--allocation 2:4" in card.content
    assert "pipeline(" not in card.content


def test_what_is_unknown_is_left_out(tmp_path):
    make_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "report.json").unlink()
    (tmp_path / "m" / "cap_config.json").unlink()
    card = render(tmp_path / "m")
    data = card.data.to_dict()
    for key in ("base_model", "base_model_relation", "license", "datasets", "model-index", "metrics"):
        assert key not in data
    for heading in ("## Accuracy", "## Citation", "Seed", "Versions", "cap-hf prune", "None", "Undefined"):
        assert heading not in card.content
    assert "accuracy of this model was not recorded" in card.content


def test_names_cannot_break_the_yaml_or_inject(tmp_path):
    make_checkpoint(
        tmp_path / "m",
        facts={
            "model_name_or_path": NASTY,
            "data": {"dataset_name": NASTY, "dataset_config_name": NASTY, "eval_split_name": NASTY},
            "versions": {NASTY: NASTY},
        },
    )
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["id2label"] = {"0": NASTY, "1": "a\r\nb", "2": "c"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    cap_config = json.loads((tmp_path / "m" / "cap_config.json").read_text())
    cap_config["exclude"] = ["[v```\n<script>]it.layers.0.attention.q_proj"]
    (tmp_path / "m" / "cap_config.json").write_text(json.dumps(cap_config))
    card = render(tmp_path / "m")
    block = str(card).split("\n---\n")[0].removeprefix("---\n")
    data = yaml.safe_load(block)
    assert "license" not in data
    assert "base_model" not in data
    assert data["model-index"][0]["results"][0]["dataset"]["name"].endswith("--- license: evil # head")
    assert "1787569" not in card.content  # Jinja in a name is text
    outside = re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)
    assert "<script>" not in outside
    assert "\n# head" not in card.text
    assert card.content.count("```") % 2 == 0
    assert "](c)" not in outside.replace("\\](c)", "").replace("\\]\\(c\\)", "")
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_a_report_about_other_weights_is_refused(tmp_path):
    make_checkpoint(tmp_path / "m")
    report = json.loads((tmp_path / "m" / "report.json").read_text())
    report["pruning"]["layers"][3]["num_zeros"] += 1
    (tmp_path / "m" / "report.json").write_text(json.dumps(report))
    with pytest.raises(CAPError, match="is not about these weights"):
        render(tmp_path / "m")


@pytest.mark.parametrize("seed", ["](x) <script>alert(1)</script>\n# head", {"a": 1}, 1.5])
def test_a_seed_is_a_number(tmp_path, seed):
    make_checkpoint(tmp_path / "m", facts={"seed": seed})
    with pytest.raises(CAPError, match=r"report\.json: seed is .*, which is no int"):
        render(tmp_path / "m")


def test_a_recovered_checkpoint_is_as_accurate_as_it_is_now(tmp_path):
    """Its report says under `sparse` how accurate it was before."""
    make_checkpoint(tmp_path / "m", facts={"recovered": {"top1": 0.7, "loss": 0.6, "num_examples": 8}})
    card = render(tmp_path / "m")
    assert "| | dense | sparse | recovered (this model) |" in card.content
    assert "| top-1 accuracy % | 75.00 | 62.50 | 70.00 |" in card.content
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert [result.metric_value for result in results] == [0.7]


TRAINED = {
    "model_name_or_path": "/a/O/sparsity-0.75",
    "teacher_model_name_or_path": "/a/dense",
    "training_arguments": {"max_steps": 3, "learning_rate": 1e-4, "hub_model_id": "r", "disable_tqdm": True},
    "recovered": {"top1": 0.7, "loss": 0.6, "num_examples": 8},
    "num_processes": 2,
}
GRADUALLY = TRAINED | {"training_arguments": {"sparsity_schedule": "0.5,0.75,2,cubic", "seed": 7}}
GRADUALLY |= {"teacher_model_name_or_path": None, "dense": None, "model_name_or_path": "/a/col"}


@pytest.mark.parametrize(
    ("facts", "base_model", "said", "command"),
    [
        (
            TRAINED,
            None,
            [
                "classification, recovered from sparsity-0.75 with dense as its teacher: 75.00 %",
                "It ran in 2 processes.",
            ],
            "finetune --model_name_or_path sparsity-0.75 --teacher_model_name_or_path dense --dataset_name "
            "someone/pictures --eval_split_name test --max_steps 3 --learning_rate 0.0001",
        ),
        (
            TRAINED | {"recovered": None},
            "someone/vit",
            ["pruned from [someone/vit](https://huggingface.co/someone/vit) and recovered from sparsity-0.75 with"],
            "finetune --model_name_or_path sparsity-0.75 --teacher_model_name_or_path dense --dataset_name "
            "someone/pictures --eval_split_name test --max_steps 3 --learning_rate 0.0001",
        ),
        (
            TRAINED | {"training_arguments": {"max_steps": 3, "hard_label_weight": 0.0}},
            None,
            ["recovered: trained without labels, towards what its teacher makes of the same images, with every zero"],
            "finetune --model_name_or_path sparsity-0.75 --teacher_model_name_or_path dense --dataset_name "
            "someone/pictures --eval_split_name test --max_steps 3 --hard_label_weight 0.0",
        ),
        (
            GRADUALLY,
            None,
            ["pruned gradually from col while it was trained: 75.00 %", "| top-1 accuracy % | 62.50 | 70.00 |"],
            "finetune --model_name_or_path col --dataset_name someone/pictures --eval_split_name test --method "
            "magnitude --sparsity_schedule 0.5,0.75,2,cubic --seed 7",
        ),
    ],
)
def test_the_run_that_is_told_of_was_run(tmp_path, facts, base_model, said, command):
    """A card told of a checkpoint at 97 % that was pruned to 97 %, and of a gradual run that it was one `prune`."""
    make_checkpoint(tmp_path / "m", facts=facts)
    content = render(tmp_path / "m", base_model=base_model).content
    for words in said:
        assert words in content
    assert re.findall(r"^cap-hf (?:prune|finetune).*$", content, re.MULTILINE) == [f"cap-hf {command}"]
    assert ("## Accuracy" in content) == bool(facts["recovered"])


def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(tmp_path, monkeypatch):
    make_custom_checkpoint(tmp_path / "m")
    monkeypatch.setattr(builtins, "input", None)  # nobody can be asked
    with pytest.raises(CAPError, match="--trust_remote_code"):
        render(tmp_path / "m")
    assert "OwnClassifier for image classification" in render(tmp_path / "m", trust_remote_code=True).content


def test_license_comes_from_the_base_model(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    assert base_license(str(base)) == {}
    data = ModelCardData(license="other", license_name="house-license", license_link="LICENSE.md")
    (base / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n# base\n")
    assert base_license(str(base)) == {
        "license": "other",
        "license_name": "house-license",
        "license_link": "LICENSE.md",
    }
    (base / "README.md").write_text("---\nlicense: 'a: b'\n---\n")
    assert base_license(str(base)) == {}
    make_checkpoint(tmp_path / "m", facts={"model_name_or_path": str(base)})
    card = render(tmp_path / "m")
    assert str(tmp_path) not in str(card)  # where folders lie is nobody's business
    assert "pruned from base" in card.content


FEATURES = {"knn_top1": 0.75, "knn_top1_se": 0.043, "knn_top1_drop_se": 0.004, "cosine": 0.98765, "cosine_se": 0.0012}
FEATURES |= {"bank_examples": 5000, "num_examples": 100}


def backbone(folder, compressed=False):
    model = tiny_dinov2()
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)
    report = {
        "model_name_or_path": "someone/dinov2",
        "data": {"dataset_name": "someone/pictures", "eval_split_name": "test"},
        "dense": {"knn_top1": 0.8, "knn_top1_se": 0.04, "cosine": 1.0, "num_examples": 100},
        "sparse": FEATURES,
        "pruning": compressor.prune(0.5).to_dict(),
    }
    save_checkpoint(folder, model, compressor.config, report, make_processor(), compressed)


def run_python(content, cut):
    """Run a code block of a card on the folder that its name stands for."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", content, flags=re.DOTALL):
        if cut in block:
            exec(block, names)
    return names


def test_a_backbone_is_no_classifier(tmp_path):
    backbone(tmp_path / "m")
    card = render(tmp_path / "m", str(tmp_path / "m"))
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "image-feature-extraction"
    _, results = model_index_to_eval_results(data["model-index"])
    assert [(each.task_type, each.metric_name, each.metric_value) for each in results] == [
        ("image-feature-extraction", "k-NN top-1 accuracy", 0.75)
    ]
    content = card.content
    for said in (
        "Dinov2Model, a vision backbone, pruned from [someone/dinov2]",
        "## What was measured",
        "| | dense | this model | drop |",
        "| k-NN top-1 accuracy % | 80.00 ± 4.00 | 75.00 ± 4.30 | 5.00 ± 0.40 |",
        "| cosine of an image's feature to the dense model's, mean | 1.0000 | 0.9877 ± 0.0012 |  |",
        "± is the standard error over these examples; that of the drop from the dense model is of the differences on",
        "know 5,000 labelled images of the train split.",
        'pipeline("image-feature-extraction", model=',
        "from cap_hf import SparseAutoModel",
    ):
        assert said in content
    for wrong in ("classes apart", "LABEL_0", "ForImageClassification", "classification", "None"):
        assert wrong not in content
    names = run_python(content, "AutoImageProcessor")
    assert type(names["model"]) is transformers.Dinov2Model


def test_what_the_card_of_a_compressed_backbone_says_loads_it(tmp_path):
    backbone(tmp_path / "m", compressed=True)
    content = render(tmp_path / "m", str(tmp_path / "m")).content
    assert type(run_python(content, "AutoImageProcessor")["model"]) is transformers.Dinov2Model
    assert int((run_python(content, "SparseAutoModel")["model"].layernorm.weight == 0).sum()) == 0


def test_a_model_with_a_text_tower_is_loaded_by_its_own_class(tmp_path):
    clip_checkpoint(tmp_path / "m")
    card = render(tmp_path / "m", str(tmp_path / "m"))
    assert card.data.to_dict()["pipeline_tag"] == "zero-shot-image-classification"
    assert "CLIPModel for zero-shot image classification: 0.00 % of" in card.content
    assert type(run_python(card.content, "AutoImageProcessor")["model"]) is transformers.CLIPModel
    assert "How close this model is to the dense one was not recorded." in card.content
