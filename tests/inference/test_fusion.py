"""GELU at the end of sparse layers, and MLPs as a whole: where that is the same, and only there."""

import copy
import pickle
from itertools import chain, pairwise

import pytest
import torch
from support.inference import logits, make_vit, pixels, sparse_layers
from torch import nn

from cap_hf import optimize_for_inference
from cap_hf.inference import attention, optimize
from cap_hf.inference.fusion import find_gelus, find_mlps, fuse_gelus, fuse_mlps, is_gelu
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
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
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
        if self.how == "kept":
            second = self.act(first)
            return self.fc2(second) + second[:, :8]
        if self.how == "added":
            return self.fc2(self.act(first) + 1)
        if self.how == "deep":
            return self.fc3(self.fc2(self.act(first)))
        if self.how == "again":
            return self.fc2(self.act(first)) + self.fc1(pixel_values)[:, :8]
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


@pytest.mark.parametrize(
    ("how", "expected"),
    [("plain", {"fc1": "fc2"}), ("deep", {"fc1": "fc2"}), *((how, {}) for how in ("shared", "kept", "added", "gated"))],
)
def test_an_mlp_is_found_where_nothing_else_sees_what_is_inside(how, expected):
    model = MLP(how)
    names = ["fc1", "fc2", "fc3"]
    before, gelus = model(**X), find_gelus(model, names, X)
    assert find_mlps(model, gelus, names, X) == expected
    assert find_mlps(model, gelus, ["fc1", "fc3"], X) == {}
    assert torch.equal(model(**X), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


HOOKS = ("register_forward_hook", "register_forward_pre_hook")


@pytest.mark.parametrize("register", HOOKS)
def test_an_mlp_with_hooks_that_would_see_other_numbers_is_left(register):
    """Also a hook that is called after a layer sees what went into it."""
    model = MLP("plain")
    getattr(model.fc2, register)(lambda *_: None)
    gelus = find_gelus(model, ["fc1"], X)
    assert gelus == {"fc1": "act"}
    assert find_mlps(model, gelus, ["fc1", "fc2"], X) == {}


class Nested(nn.Module):
    """An MLP in parts, as in Swinv2 and others: `wide` ends with the GELU, or the Linear before it is a part."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Sequential(nn.Linear(8, 16)), nn.GELU())
        self.drop, self.narrow = nn.Dropout(0.0), nn.Sequential(nn.Linear(16, 8))
        self.eval()

    def forward(self, pixel_values):
        return self.narrow(self.drop(self.wide(pixel_values)))


@pytest.mark.parametrize(
    ("where", "register", "gelu", "mlp"),
    [
        ("", 0, True, True),
        ("", 1, True, True),
        ("wide", 0, True, False),
        ("wide", 1, True, True),  # it is called before anything is made
        ("wide.0", 0, False, False),
        ("wide.0", 1, True, True),
        ("wide.1", 0, False, False),
        ("wide.1", 1, False, False),
        ("drop", 0, True, False),
        ("drop", 1, True, False),
        ("narrow", 0, True, False),
        ("narrow", 1, True, False),
    ],
)
def test_hooks_on_what_is_between_and_around_are_respected(where, register, gelu, mlp):
    model = Nested()
    getattr(model.get_submodule(where), HOOKS[register])(lambda *_: None)
    gelus = find_gelus(model, ["wide.0.0"], X)
    assert gelus == ({"wide.0.0": "wide.1"} if gelu else {})
    found = find_mlps(model, gelus, ["wide.0.0", "narrow.0"], X)
    assert found == ({"wide.0.0": "narrow.0"} if mlp else {})


def test_hooks_on_all_modules_are_respected():
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert find_gelus(Nested(), ["wide.0.0"], X) == {}


class Head(nn.Module):
    """Linear layers with a GELU between each two, as the projection heads of self-supervised models."""

    def __init__(self, *sizes):
        super().__init__()
        layers = [(nn.Linear(size, behind), nn.GELU()) for size, behind in pairwise(sizes)]
        self.layers = nn.Sequential(*chain.from_iterable(layers))[:-1].eval()

    def forward(self, pixel_values):
        return self.layers(pixel_values)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 16, 24, 8), {"layers.2": "layers.4"}),  # the second layer has a GELU of its own
        ((8, 16, 8, 16, 8), {"layers.4": "layers.6"}),
        ((8, 16, 16), {}),  # nothing tells what it has done from what it has to do
        ((8, 8, 4), {"layers.0": "layers.2"}),
    ],
)
def test_a_layer_is_the_second_of_an_mlp_or_ends_with_a_gelu(sizes, expected):
    model = Head(*sizes)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    before, gelus = model(**X), find_gelus(model, names, X)
    assert len(gelus) == len(sizes) - 2
    assert find_mlps(model, gelus, names, X) == expected
    assert torch.equal(model(**X), before)


def test_a_gelu_of_two_layers_is_part_of_no_mlp():
    class Model(MLP):
        def forward(self, pixel_values):
            return self.fc2(self.act(self.fc1(pixel_values))) + self.fc2(self.act(self.fc3(pixel_values)))

    model = Model("plain")
    model.fc3 = nn.Linear(8, 16)
    names = ["fc1", "fc2", "fc3"]
    gelus = find_gelus(model, names, X)
    assert gelus == {"fc1": "act", "fc3": "act"}
    assert find_mlps(model, gelus, names, X) == {}


def test_a_model_that_asks_its_layers_for_what_they_are_is_left():
    class Asking(MLP):
        def forward(self, pixel_values):
            hidden = self.act(self.fc1(pixel_values))
            return self.fc2(hidden.to(self.fc2.weight.dtype))

    model = Asking("plain")
    gelus = find_gelus(model, ["fc1"], X)
    assert gelus == {"fc1": "act"}
    assert find_mlps(model, gelus, ["fc1", "fc2"], X) == {}
    model.act.register_buffer("weight", torch.ones(1))
    model.fc2.forward = lambda x: nn.Linear.forward(model.fc2, x * model.act.weight)
    assert find_gelus(model, ["fc1"], X) == {}


def test_inference_mode_outside_changes_nothing_and_inside_nothing_is_fused():
    model = MLP("plain")
    with torch.inference_mode():
        gelus = find_gelus(model, ["fc1"], X)
        assert gelus == {"fc1": "act"}
        assert find_mlps(model, gelus, ["fc1", "fc2"], X) == {"fc1": "fc2"}
    model.forward = torch.inference_mode()(model.forward)
    assert find_gelus(model, ["fc1"], X) == {}


def test_what_is_written_to_in_place_is_not_handed_on():
    class Clamped(MLP):
        def forward(self, pixel_values):
            hidden = self.act(self.fc1(pixel_values))
            hidden.clamp_(max=100)  # which changes nothing here, and may elsewhere
            return self.fc2(hidden)

    model = Clamped("plain")
    gelus = find_gelus(model, ["fc1"], X)
    assert gelus == {"fc1": "act"}
    assert find_mlps(model, gelus, ["fc1", "fc2"], X) == {}


@pytest.mark.parametrize("how", ["gated", "copied", "twice", "again", "kept", "added", "shared"])
def test_what_cannot_be_fused_keeps_nothing_else_from_it(how):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.plain, self.third = MLP(how), MLP("plain"), MLP("plain")

        def forward(self, pixel_values):
            return self.odd(pixel_values) + self.plain(pixel_values) + self.third(pixel_values)

    model = Two().eval()
    names = [f"{part}.{layer}" for part in ("odd", "plain", "third") for layer in ("fc1", "fc2", "fc3")]
    gelus = find_gelus(model, names, X)
    expected = {"plain.fc1": "plain.act", "third.fc1": "third.act"}
    if how == "shared":
        expected |= {"odd.fc1": "odd.act", "odd.fc2": "odd.act"}
    if how in ("kept", "added"):
        expected |= {"odd.fc1": "odd.act"}
    assert gelus == expected
    assert find_mlps(model, gelus, names, X) == {"plain.fc1": "plain.fc2", "third.fc1": "third.fc2"}


def fused_vit():
    """Return a ViT of sparse int8 layers with its MLPs fused, its inputs, and what it returned before that."""
    model = make_vit()
    example = {"pixel_values": pixels(model)}
    names = find_sparse_linears(model)
    gelus = find_gelus(model, names, example)
    mlps = find_mlps(model, gelus, names, example)
    assert mlps == {f"vit.layers.{i}.mlp.fc1": f"vit.layers.{i}.mlp.fc2" for i in range(2)}
    for name, linear in names.items():
        replace(model, name, SparseInt8Linear(linear))
    fuse_gelus(model, gelus)
    expected = logits(model, example["pixel_values"])
    fuse_mlps(model, mlps)
    return model, example["pixel_values"], expected


def test_a_fused_mlp_changes_no_bit_and_no_weight_and_is_copied_whole():
    model, x, expected = fused_vit()
    plain = make_vit()
    for name, linear in find_sparse_linears(plain).items():
        replace(plain, name, SparseInt8Linear(linear))
    assert torch.equal(logits(model, x), expected)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mlp = copied.vit.layers[0].mlp
        assert mlp.fc1.next[0] is mlp.fc2
        assert torch.equal(logits(copied, x), expected)
    # What is loaded is what is computed with, in either layer.
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    plain.load_state_dict(model.state_dict())
    for layer in plain.vit.layers:
        layer.mlp.fc1.gelu, layer.mlp.activation_fn = True, nn.Identity().eval()
    assert torch.equal(logits(model, x), logits(plain, x))


def test_a_fused_mlp_is_compiled_and_exported():
    model, x, expected = fused_vit()
    mlp = model.vit.layers[0].mlp
    hidden = torch.randn(2, 9, mlp.fc1.in_features)
    with torch.inference_mode():
        once = mlp(hidden)
        assert torch.equal(torch.compile(mlp, fullgraph=True)(hidden), once)
    exported = torch.export.export(mlp, (hidden,))
    assert torch.equal(exported.module()(hidden), once)
    assert torch.equal(logits(model, x), expected)


def test_the_second_layer_of_a_fused_mlp_works_alone_too():
    """By the size of what it gets it knows whether its work is done; what does not fit is an error."""
    model, x, _ = fused_vit()
    mlp = model.vit.layers[0].mlp
    hidden = torch.randn(3, mlp.fc2.in_features)
    assert mlp.fc2(hidden).shape == (3, mlp.fc2.out_features)
    assert torch.equal(copy.deepcopy(mlp.fc2)(hidden), mlp.fc2(hidden))
    assert f"with the layer behind it: {mlp.fc2.out_features}" in repr(mlp.fc1)
    assert "computed by the layer before" in repr(mlp.fc2)
    mlp.fc2 = nn.Linear(mlp.fc2.in_features, mlp.fc2.out_features)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        logits(model, x)


def test_an_mlp_is_fused_only_if_both_of_its_layers_are_sparse_int8():
    for kinds in ((SparseInt8Linear, SparseLinear), (SparseLinear, SparseInt8Linear), (SparseInt8Linear, nn.Linear)):
        model = MLP("plain")
        gelus = find_gelus(model, ["fc1"], X)
        mlps = find_mlps(model, gelus, ["fc1", "fc2"], X)
        for name, kind in zip(("fc1", "fc2"), kinds, strict=True):
            if kind is not nn.Linear:
                replace(model, name, kind(model.get_submodule(name)))
        fuse_gelus(model, gelus)
        expected = model(**X)
        fuse_mlps(model, mlps)
        assert torch.equal(model(**X), expected)
        assert not getattr(model.fc1, "next", ())


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


def test_optimising_does_both_and_float32_keeps_its_attention(monkeypatch):
    monkeypatch.setattr(optimize, "is_faster", lambda *_: True)
    monkeypatch.setattr(optimize, "fastest_kind", lambda *_: SparseInt8Linear)
    monkeypatch.setattr(attention, "time_in_turns", lambda calls, *limits: [[1.0], [0.5]])
    for dtype, name in (("float32", "sdpa"), ("int8", attention.NAME)):
        model = make_vit()
        expected = logits(model, pixels(model))
        optimize_for_inference(model, dtype=dtype)
        assert [layer.mlp.fc1.gelu for layer in model.vit.layers] == [True, True]
        assert sum(layer.gelu for layer in sparse_layers(model)) == 2
        assert sum(getattr(layer, "is_done", False) for layer in sparse_layers(model)) == (2 if dtype == "int8" else 0)
        assert model.config._attn_implementation == name
        found = logits(model, pixels(model))
        assert float((found - expected).norm() / expected.norm()) < (1e-4 if dtype == "float32" else 0.1)
