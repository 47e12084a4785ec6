"""CAPConfig: validation and the JSON round trip."""

import pytest

from cap_hf import CAPConfig, CAPError


def test_round_trip(tmp_path):
    config = CAPConfig(allocation="2:4", fisher_block_size="192", damp=1e-3, include=["a*"], seed=7)
    config.save(tmp_path)
    assert CAPConfig.load(tmp_path) == config
    assert config.fisher_block_size == 192
    assert config.nm.sparsity == 0.5
    assert str(CAPConfig(pattern="1x4").structure) == "1x4"
    with pytest.raises(CAPError, match="allocation=2:4 has a pattern of its own: it does not go with pattern=1x4"):
        CAPConfig(allocation="2:4", pattern="1x4")
    with pytest.raises(CAPError, match="no field speed"):
        CAPConfig.from_dict({"speed": 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "best"),
        ("selection", "random"),
        ("allocation", "4:2"),
        ("allocation", "2:"),
        ("allocation", "0:4"),
        ("pattern", "1x3"),
        ("pattern", "4"),
        ("pattern", 4),
        ("pattern", ["1x4"]),
        ("fisher_loss", "exact"),
        ("weight_update", "some"),
        ("num_grads", 0),
        ("num_grads", 1.5),
        ("samples_per_grad", -1),
        ("fisher_block_size", "column"),
        ("fisher_block_size", 0),
        ("fisher_prior", "none"),
        ("prior_strength", 1.0),
        ("prior_strength", -0.1),
        ("prior_strength", float("nan")),
        ("prior_strength", True),
        ("damp", 0.0),
        ("damp", float("nan")),
        ("damp", float("inf")),
        ("refit", "yes"),
        ("refit_examples", 0),
        ("refit_ridge", 0.0),
        ("refit_ridge", "small"),
    ],
)
def test_a_wrong_value_is_named(field, value):
    with pytest.raises(CAPError, match=field):
        CAPConfig(**{field: value})


def test_a_config_of_before_there_was_a_prior_or_a_refit_had_none():
    earlier = CAPConfig().to_dict()
    for name in ("fisher_prior", "prior_strength", "refit"):
        del earlier[name]
    assert CAPConfig.from_dict(earlier).fisher_prior == "identity"
    assert CAPConfig.from_dict(earlier).refit is False
    assert CAPConfig.from_dict(CAPConfig().to_dict()) == CAPConfig()
