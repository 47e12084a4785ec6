"""Attention in int8 behind transformers' interface: where it is taken, and what is as it was elsewhere."""

import copy

import pytest
import torch
from support.backbones import tiny_clip
from support.inference import logits, make_vit, pixels
from support.models import build
from torch import nn
from transformers import AutoModel, ViTForImageClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cap_hf.inference import attention
from cap_hf.inference.attention import NAME, configs_of, int8_attention_forward, speed_up_attention
from cap_hf.inference.operators import has_int8_kernel


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_int8_kernel(), "no C++ compiler: the kernel cannot be tested"


class Layer(nn.Module):
    is_causal = False


def heads(queries=5, keys=7, images=2, heads=4, cols=8):
    return [torch.randn(images, queries if i == 0 else keys, heads, cols).transpose(1, 2) for i in range(3)]


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_is_attention(scaling):
    q, k, v = heads()
    y, weights = int8_attention_forward(Layer(), q, k, v, None, scaling=scaling)
    expected, _ = sdpa_attention_forward(Layer(), q, k, v, None, scaling=scaling)
    assert weights is None
    assert y.shape == expected.shape == (2, 5, 4, 8)
    assert 0 < float((y - expected).norm() / expected.norm()) < 0.03


def test_whatever_is_not_plain_is_pytorchs_own():
    q, k, v = heads(7, 7)
    mask, causal, grouped = torch.rand(2, 1, 7, 7) < 0.8, Layer(), Layer()
    mask |= torch.eye(7, dtype=torch.bool)
    causal.is_causal, grouped.num_key_value_groups = True, 2
    for module, arguments, options in (
        (Layer(), (q, k, v, mask), {}),
        (causal, (q, k, v, None), {}),
        (Layer(), (q, k, v, None), {"is_causal": True}),
        (nn.Module(), (q, k, v, None), {}),  # that does not say it is not causal
        (grouped, (q, k[:, :2], v[:, :2], None), {}),
        (Layer(), (q, k, v, None), {"position_bias": torch.randn(1, 4, 7, 7)}),
        (Layer(), (q, k, torch.randn(2, 4, 7, 3), None), {}),
        (Layer(), (q.double(), k.double(), v.double(), None), {}),
        (Layer(), (q, k, v, None), {"scaling": -0.5}),
    ):
        found, _ = int8_attention_forward(module, *arguments, **options)
        assert torch.equal(found, sdpa_attention_forward(module, *arguments, **options)[0])
    torch.manual_seed(0)
    found, _ = int8_attention_forward(Layer(), q, k, v, None, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(found, sdpa_attention_forward(Layer(), q, k, v, None, dropout=0.5)[0])


def switched(model):
    for config in configs_of(model):
        config._attn_implementation = NAME
    return model


def test_a_model_takes_it_and_is_saved_without_it(tmp_path):
    model = make_vit()
    x, expected = pixels(model), logits(model, pixels(model))
    switched(model)
    found = logits(model, x)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.02
    assert torch.equal(logits(copy.deepcopy(model), x), found)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_it_is_compiled_and_exported():
    model = switched(make_vit())
    x = pixels(model)
    with torch.inference_mode():
        expected = model(pixel_values=x).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values=x).logits, expected, rtol=1e-3, atol=1e-3)
        exported = torch.export.export(model, (), {"pixel_values": x}).module()
        torch.testing.assert_close(exported(pixel_values=x).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_text_tower_keeps_its_mask(monkeypatch):
    model = tiny_clip().eval()
    assert len(configs_of(model)) >= 2
    text = {"input_ids": torch.tensor([[0, 1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    with torch.inference_mode():
        expected = model.get_text_features(**text)
        switched(model)
        monkeypatch.setattr(attention, "int8_attention", None)  # would fail if it were called
        found = model.get_text_features(**text)
    for each in (found, expected):
        assert getattr(each, "pooler_output", each) is not None
    torch.testing.assert_close(getattr(found, "pooler_output", found), getattr(expected, "pooler_output", expected))


def test_parts_that_do_not_choose_pytorchs_attention_are_left():
    model = make_vit()
    model.config._attn_implementation = "eager"
    assert configs_of(model) == []
    assert configs_of(nn.Linear(2, 2)) == []


@pytest.fixture
def measured(monkeypatch):
    """Let int8 take this share of the time."""

    def measure(share):
        def in_turns(calls, *limits):
            for call in calls:
                call()
            return [[1.0], [share]]

        monkeypatch.setattr(attention, "time_in_turns", in_turns)

    return measure


@pytest.mark.parametrize("faster", [True, False])
def test_attention_is_int8_where_that_is_faster(faster, measured):
    model = make_vit()
    config, other = model.config, ViTForImageClassification(model.config).eval()
    x, expected = pixels(model), logits(model, pixels(model))
    measured(0.9 if faster else 0.97)
    speed_up_attention(model, {"pixel_values": x})
    assert torch.equal(logits(model, x), expected) != faster
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
        attention.NAME if faster else "sdpa"
    }
    # What else was made of the same config keeps its attention.
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"


def test_attention_that_int8_cannot_take_is_left_however_fast_it_seems(measured):
    """Swin's has a mask or a bias always, and ConvNeXt none at all."""
    measured(0.1)
    for name in ("Swin", "ConvNext"):
        model = build(name)
        before = model.config._attn_implementation
        speed_up_attention(model, {"pixel_values": torch.randn(1, 3, 16, 16)})
        assert model.config._attn_implementation == before


def test_a_text_tower_and_parts_that_chose_otherwise_keep_what_they_have(measured):
    measured(0.1)
    model = tiny_clip().eval()
    model.config.text_config._attn_implementation = "eager"
    side = model.config.vision_config.image_size
    speed_up_attention(model, {"pixel_values": torch.randn(1, 3, side, side)})
    assert model.vision_model.config._attn_implementation == attention.NAME
    assert model.text_model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"


def test_a_failure_while_it_is_tried_leaves_everything(monkeypatch):
    model = make_vit()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(attention, "time_in_turns", fail)
    with pytest.raises(KeyboardInterrupt):
        speed_up_attention(model, {"pixel_values": pixels(model)})
    assert model.config._attn_implementation == "sdpa"
