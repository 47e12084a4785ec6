"""GELU at the end of sparse layers: where that is the same, and only there; attention in int8 where it is faster."""

import copy

import pytest
import torch
from support.backbones import tiny_clip
from support.inference import logits, make_vit, pixels, sparse_layers
from support.models import build
from torch import nn
from transformers import ViTForImageClassification

from cap_hf import optimize_for_inference
from cap_hf.inference import attention, fusion, optimize
from cap_hf.inference.fusion import find_gelus, fuse_gelus, is_gelu, speed_up_attention
from cap_hf.inference.int8_linear import SparseInt8Linear
from cap_hf.inference.linear import CSRLinear, SparseLinear
from cap_hf.inference.operators import has_int8_kernel, has_kernel
from cap_hf.inference.optimize import find_sparse_linears, replace


@pytest.fixture(scope="module", autouse=True)
def kernels():
    assert has_kernel()
    assert has_int8_kernel()


X = {"pixel_values": torch.randn(2, 8)}


class MLP(nn.Module):
    """Takes `pixel_values` `(n, 8)`; what it does with GELU is up to `how`."""

    def __init__(self, how):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act = nn.GELU("tanh" if how == "tanh" else "none")
        self.how = how
        self.eval()

    def forward(self, pixel_values):
        first = self.fc1(pixel_values)
        if self.how == "gated":
            return self.fc2(self.act(first) * first)
        if self.how == "copied":
            return self.fc2(self.act(first * 1))
        if self.how == "shared":
            return self.fc3(self.act(self.fc2(self.act(first))))
        if self.how == "twice":
            return self.fc2(self.act(first)) + self.act(pixel_values)
        if self.how == "again":
            return self.fc2(self.act(first)) + self.fc1(pixel_values)
        return self.fc2(self.act(first))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("plain", {"fc1": "act"}),
        ("shared", {"fc1": "act", "fc2": "act"}),
        ("gated", {}),
        ("copied", {}),
        ("twice", {}),
        ("again", {}),
        ("tanh", {}),
    ],
)
def test_a_gelu_is_found_where_nothing_else_sees_what_it_takes(how, expected):
    model = MLP(how)
    before = model(**X)
    assert find_gelus(model, ["fc1", "fc2", "fc3"], X) == expected
    assert torch.equal(model(**X), before)  # no hook is left
    assert not model.fc1._forward_hooks
    assert not model.act._forward_hooks
    assert not model.act._forward_pre_hooks


class Odd(nn.Module):
    """An MLP that uses its GELU in ways that no look at the modules' calls would show."""

    def __init__(self, how):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act = nn.GELU()
        self.how, self.held = how, [self.act]
        if how == "two names":
            self.same = self.act
        self.eval()

    def forward(self, pixel_values):
        act = self.held[0] if self.how == "held" else self.act
        y = self.fc2(act(self.fc1(pixel_values)))
        if self.how == "forward":
            return y + self.act.forward(pixel_values)
        return y


@pytest.mark.parametrize("how", ["held", "forward", "two names"])
def test_a_gelu_that_is_used_otherwise_too_stays(how):
    model = Odd(how)
    expected = model(**X)
    assert find_gelus(model, ["fc1"], X) == {}
    assert torch.equal(model(**X), expected)
    assert is_gelu(model.act)
    assert type(model.fc1) is nn.Linear


def test_layers_with_hooks_that_would_see_other_numbers_are_left():
    for where, register in (("fc1", "register_forward_hook"), ("act", "register_forward_pre_hook")):
        model = MLP("plain")
        getattr(getattr(model, where), register)(lambda *_: None)
        assert find_gelus(model, ["fc1"], X) == {}


def test_all_of_a_vit_are_found():
    model = make_vit()
    found = find_gelus(model, find_sparse_linears(model), {"pixel_values": pixels(model)})
    assert found == {f"vit.layers.{i}.mlp.fc1": f"vit.layers.{i}.mlp.activation_fn" for i in range(2)}


def test_every_tensor_that_is_returned_is_compared():
    class Pair(MLP):
        def forward(self, pixel_values):
            first = self.fc1(pixel_values)
            return {"right": self.fc2(self.act(first)), "left": first}

    model = Pair("plain")
    assert find_gelus(model, ["fc1"], X) == {}
    assert type(model.fc1) is nn.Linear


def test_a_gelu_stays_while_one_of_its_layers_is_not_sparse():
    for kinds in ({"fc1": SparseLinear}, {"fc1": SparseLinear, "fc2": CSRLinear}):
        model = MLP("shared")
        expected, gelus = model(**X), find_gelus(model, ["fc1", "fc2"], X)
        for name, kind in kinds.items():
            replace(model, name, kind(model.get_submodule(name)))
        fuse_gelus(model, gelus)
        assert is_gelu(model.act)
        torch.testing.assert_close(model(**X), expected)


@pytest.mark.parametrize("kind", [SparseLinear, SparseInt8Linear])
def test_sparse_layers_end_with_it(kind):
    model = make_vit()
    x, gelus = pixels(model), find_gelus(model, find_sparse_linears(model), {"pixel_values": pixels(model)})
    for name, linear in find_sparse_linears(model).items():
        replace(model, name, kind(linear))
    seen, keys = [], list(model.state_dict())
    model.vit.layers[0].mlp.activation_fn.register_forward_hook(lambda _, args, y: seen.append(y.shape))
    expected = logits(model, x)
    fuse_gelus(model, gelus)
    assert not any(is_gelu(module) for module in model.modules())
    assert "gelu=True" in repr(model.vit.layers[0].mlp.fc1)
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-3, atol=1e-3)
    assert len(seen) == 2  # the hook has moved along
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(logits(copy.deepcopy(model), x), logits(model, x))


@pytest.fixture
def measured(monkeypatch):
    """Let int8 take this share of the time."""

    def measure(share):
        def in_turns(calls, *limits):
            for call in calls:
                call()
            return [[1.0], [share]]

        monkeypatch.setattr(fusion, "time_in_turns", in_turns)

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

    monkeypatch.setattr(fusion, "time_in_turns", fail)
    with pytest.raises(KeyboardInterrupt):
        speed_up_attention(model, {"pixel_values": pixels(model)})
    assert model.config._attn_implementation == "sdpa"


def test_optimising_does_both_and_float32_keeps_its_attention(monkeypatch):
    monkeypatch.setattr(optimize, "is_faster", lambda *_: True)
    monkeypatch.setattr(optimize, "fastest_kind", lambda *_: SparseInt8Linear)
    monkeypatch.setattr(fusion, "time_in_turns", lambda calls, *limits: [[1.0], [0.5]])
    for dtype, name in (("float32", "sdpa"), ("int8", attention.NAME)):
        model = make_vit()
        expected = logits(model, pixels(model))
        optimize_for_inference(model, dtype=dtype)
        assert [layer.mlp.fc1.gelu for layer in model.vit.layers] == [True, True]
        assert sum(layer.gelu for layer in sparse_layers(model)) == 2
        assert model.config._attn_implementation == name
        found = logits(model, pixels(model))
        assert float((found - expected).norm() / expected.norm()) < (1e-4 if dtype == "float32" else 0.1)
