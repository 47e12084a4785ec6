"""The card says what was measured, nothing else, and names cannot break it."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from support.checkpoints import make_checkpoint

from cap_hf import CAPError
from cap_hf.hub.card import CardFacts, base_license, code, hub_id, text
from cap_hf.hub.picture import draw_sparsity
from cap_hf.hub.publish import prepare_folder

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


def test_prepared_folder_is_complete(tmp_path):
    make_checkpoint(tmp_path / "m")
    prepare_folder(tmp_path / "m", tmp_path / "out", "user/small-vit", compressed=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "cap_config.json",
        "config.json",
        "model.cap.safetensors",
        "preprocessor_config.json",
        "report.json",
        "sparsity.png",
    ]
    assert (tmp_path / "out" / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "m" / "model.safetensors").is_file()
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    with pytest.raises(CAPError, match=r"has no preprocessor_config\.json"):
        prepare_folder(tmp_path / "m", tmp_path / "other", "user/small-vit")
    assert not (tmp_path / "other").exists()
    for name in ("a/b/c", "x y/z", "user/name\nx", ""):
        with pytest.raises(CAPError, match="cannot be a repository"):
            prepare_folder(tmp_path / "m", tmp_path / "other", name)


def test_names_of_folders_and_of_repositories():
    assert hub_id("facebook/deit-small") == "facebook/deit-small"
    for name in (None, "", "digits", "/a/b", "../a/b", "a/b/c", "a b/c"):
        assert hub_id(name) is None
    assert text("a_b*c <i>") == "a\\_b\\*c &lt;i&gt;"
    assert code("a`b") == "a'b"


def test_a_picture_of_any_names(tmp_path):
    draw_sparsity(["$x^{", "a" * 300, "ä"], [0.0, 0.5, 1.0], 0.5, tmp_path / "x.png")
    draw_sparsity([str(index) for index in range(300)], [0.1] * 300, 0.1, tmp_path / "y.png")
    assert (tmp_path / "y.png").stat().st_size > 1000
