"""The card says what was measured, nothing else, and names cannot break it."""

import builtins
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from support.checkpoints import make_checkpoint, make_custom_checkpoint

from cap_hf import CAPError
from cap_hf.hub.card import CardFacts, base_license, code, hub_id, text

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
    assert "| top-1 accuracy % | 75.00 | 70.00 |" in card.content
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert [result.metric_value for result in results] == [0.7]


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


def test_names_of_folders_and_of_repositories():
    assert hub_id("facebook/deit-small") == "facebook/deit-small"
    for name in (None, "", "digits", "/a/b", "../a/b", "a/b/c", "a b/c"):
        assert hub_id(name) is None
    assert text("a_b*c <i>") == "a\\_b\\*c &lt;i&gt;"
    assert code("a`b") == "a'b"
