"""Points of one line were made in the same way."""

from support.runs import recovered, report

from cap_hf.pages.origins import Origin
from cap_hf.pages.series import Model, series_of, settings_of, tell_apart


def series(*models: Model) -> list[str]:
    tell_apart(models)
    return [model.series for model in models]


def test_models_of_one_setting_are_one_line():
    assert series(Model("a/1", "cap", 0.5), Model("a/2", "cap", 0.9)) == ["cap", "cap"]
    # Also from several folders, where each adds sparsities.
    assert series(Model("a/1", "cap", 0.5), Model("b/1", "cap", 0.9)) == ["cap", "cap"]
    assert series(Model("a", "recovered", 0.5), Model("b", "recovered", 0.9)) == ["recovered", "recovered"]


def test_of_one_sparsity_there_is_one_point_on_a_line():
    models = [Model(f"{folder}/{part}", "cap", part / 10) for folder in ("a", "b") for part in (5, 9)]
    assert series(*models) == ["cap (a)", "cap (a)", "cap (b)", "cap (b)"]
    assert series(Model("a/1", "cap", 0.5), Model("a/2", "cap", 0.5)) == ["cap (a/1)", "cap (a/2)"]
    assert series(Model("1", "cap", 0.5), Model("o/2", "cap", 0.5)) == ["cap (.)", "cap (o)"]


def test_other_settings_are_another_line():
    few, many = Model("a/1", "cap", 0.5, settings="32"), Model("b/1", "cap", 0.9, settings="1024")
    assert series(few, many) == ["cap (a)", "cap (b)"]
    few, many = Model("a/1", "cap", 0.5, settings="32"), Model("a/2", "cap", 0.9, settings="1024")
    assert series(few, many) == ["cap (a/1)", "cap (a/2)"]


def test_other_origins_and_runs_are_other_lines():
    vit, deit = Origin("vit", label="vit"), Origin("deit", label="deit")
    models = [Model("1", "cap", 0.5, origin=vit), Model("2", "cap", 0.9, origin=deit)]
    assert series(*models) == ["cap, vit", "cap, deit"]
    assert series(Model("1", "cap", 0.5), Model("2", "cap", 0.9, when="an earlier run")) == [
        "cap",
        "cap, an earlier run",
    ]


def test_settings_are_all_that_was_chosen():
    content = report()
    first, second = content["results"]
    assert settings_of(content, first) == settings_of(content, second)
    others = [
        (report(config={"num_grads": 8}), first),
        (content, first | {"healing": {"steps": 300, "learning_rate": 1e-4}}),
        (content, first | {"pruning": first["pruning"] | {"refit": {"examples": 8}}}),
        (report(data=content["data"] | {"max_train_samples": 8}), first),
        (recovered(), {}),
    ]
    texts = [settings_of(content, first), *(settings_of(*each) for each in others)]
    assert len(set(texts)) == len(texts)
    # What came of a healing is none.
    healed = [first | {"healing": {"steps": 300, "loss": loss}} for loss in (1.0, 2.0)]
    assert settings_of(content, healed[0]) == settings_of(content, healed[1])
    assert series_of(content, healed[0]) == "cap, healed"
