"""Blocks of a transformer in two calls: found where they are one, with the outputs of their modules, and only then."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
import transformers
from support.families import CLASSIFIERS
from support.inference import logits, make_vit, pixels, prune
from torch import nn
from transformers import set_seed

from cap_hf import optimize_for_inference
from cap_hf.inference import attention, embeddings, optimize
from cap_hf.inference.blocks import MOST_KEYS, Block, find_blocks
from cap_hf.inference.int8_linear import SparseInt8Linear
from cap_hf.inference.operators import has_int8_kernel
from cap_hf.inference.optimize import find_sparse_linears


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_int8_kernel()


@pytest.fixture(autouse=True)
def all_is_faster_in_int8(monkeypatch):
    monkeypatch.setattr(optimize, "fastest_kind", lambda *_: SparseInt8Linear)
    monkeypatch.setattr(attention, "time_in_turns", lambda *_: [[1.0], [0.5]])
    monkeypatch.setattr(embeddings, "time_in_turns", lambda *_: [[1.0], [2.0]])


SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def build(kind, **config):
    set_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")
    model = prune(model(model.config_class(**SIZES | config)).eval(), 0.5)
    with torch.no_grad():
        for parameter in model.parameters():  # those of LayerNorm and LayerScale are all alike at first
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def fused(model):
    """The modules that are computed at once."""
    return [module for module in model.modules() if "forward" in vars(module)]


def separate(model):
    """The same model, whose blocks are computed module by module."""
    model = copy.deepcopy(model)
    for module in fused(model):
        del module.forward
    return model


def close(found, expected):
    """LayerNorm's last bits differ, so a number here and there is rounded to the next of 127."""
    return float((found - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ViT", {"intermediate_size": 96}),
        ("DeiT", {"intermediate_size": 96}),
        ("ViTMSN", {"intermediate_size": 96}),
        ("IJepa", {"intermediate_size": 96}),
        ("Dinov2", {"mlp_ratio": 2}),
        ("Dinov2WithRegisters", {"mlp_ratio": 2}),
        ("ViT", {"intermediate_size": 96, "qkv_bias": False}),
    ],
)
def test_the_blocks_of_these_families_are_computed_at_once(kind, config):
    model = optimize_for_inference(build(kind, **config), dtype="int8")
    assert len(fused(model)) == 3
    x = pixels(model)
    found, expected = logits(model, x), logits(separate(model), x)
    assert close(found, expected)
    assert model.state_dict().keys() == separate(model).state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ViT", {"intermediate_size": 96, "hidden_act": "gelu_pytorch_tanh"}),
        ("ViT", {"intermediate_size": 96, "hidden_act": "relu"}),
        ("Dinov2", {"use_swiglu_ffn": True}),
    ],
)
def test_other_blocks_are_left(kind, config):
    assert fused(optimize_for_inference(build(kind, **config), dtype="int8")) == []


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_no_family_loses_its_outputs(name):
    """What a family's tiny model gives in int8 does not depend on whether its blocks are computed at once."""
    family = CLASSIFIERS[name]
    model = prune(family.build(), 0.5)
    if not find_sparse_linears(model):  # it has convolutions alone
        return
    model = optimize_for_inference(model, dtype="int8", image_size=family.side)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, family.side, family.side, generator=generator)
    assert float((logits(model, x) - logits(separate(model), x)).norm()) < 0.05 * float(logits(model, x).norm())


@contextmanager
def counted():
    """The blocks that are computed at once while it is entered."""
    at_once, calls = Block.at_once, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "at_once", lambda self, x: calls.append(self) or at_once(self, x))
        yield calls


def test_hidden_states_are_those_of_the_blocks_and_attentions_those_of_the_modules():
    """Once asked for, transformers' hooks stay on all modules; they see nothing while nobody asks."""
    model = optimize_for_inference(build("Dinov2", mlp_ratio=2), dtype="int8")
    x = pixels(model)
    with torch.inference_mode():
        for asked, count in (({}, 3), ({"output_hidden_states": True}, 3), ({"output_attentions": True}, 0), ({}, 3)):
            with counted() as calls:
                found = model(pixel_values=x, **asked)
            expected = separate(model)(pixel_values=x, **asked)
            assert len(calls) == count
            assert close(found.logits, expected.logits)
            if "output_hidden_states" in asked:
                assert len(found.hidden_states) == 4
                pairs = zip(found.hidden_states, expected.hidden_states, strict=True)
                assert all(close(*pair) for pair in pairs)


def vit():
    return optimize_for_inference(make_vit(), dtype="int8")


def hooked(model):
    model.vit.layers[0].attention.q_proj.register_forward_hook(lambda module, args, output: seen.append(output))


def pre_hooked(model):
    model.vit.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args))


def replaced(model):
    class Watching(nn.Identity):
        def forward(self, x):
            seen.append(x)
            return x

    model.vit.layers[0].dropout = Watching().eval()


def given_another_forward(model):
    norm = model.vit.layers[0].layernorm_after
    norm.forward = lambda x: seen.append(x) or nn.LayerNorm.forward(norm, x)


def parametrized(model):
    class Same(nn.Module):
        def forward(self, weight):
            seen.append(weight)
            return weight

    nn.utils.parametrize.register_parametrization(model.vit.layers[0].layernorm_before, "weight", Same())
    seen.clear()


seen: list = []


@pytest.mark.parametrize("change", [hooked, pre_hooked, replaced, given_another_forward, parametrized])
def test_what_is_changed_later_is_seen(change):
    model = vit()
    assert len(fused(model)) == 2
    x = pixels(model)
    before = logits(model, x)
    seen.clear()
    change(model)
    found = logits(model, x)
    assert seen
    assert close(found, before)


def test_a_hook_for_all_modules_is_called_for_all():
    model, calls = vit(), []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module)):
        logits(model, pixels(model))
    assert model.vit.layers[1].attention.k_proj in calls


def test_what_only_the_modules_can_do_is_left_to_them():
    model = vit()
    x, plain = pixels(model), separate(model)
    layer, twin = model.vit.layers[0], plain.vit.layers[0]
    hidden = torch.randn(2, 9, 192)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    with torch.inference_mode():
        assert not torch.equal(layer(hidden), twin(hidden))
        assert torch.equal(layer(hidden, mask), twin(hidden, mask))
        assert torch.equal(layer(hidden.double().float().mT.contiguous().mT), twin(hidden))
        assert torch.equal(
            layer(hidden.bfloat16().float(), None, output_attentions=True), twin(hidden.bfloat16().float())
        )
        assert torch.equal(layer(hidden_states=hidden), twin(hidden_states=hidden))
        for each in (layer, twin):
            each.bfloat16()
        assert torch.equal(layer(hidden.bfloat16()), twin(hidden.bfloat16()))
        for each in (layer, twin):
            each.float()
        for part in (layer.dropout, twin.dropout):
            part.train()
        assert torch.equal(layer(hidden), twin(hidden))
        for part in (layer.dropout, twin.dropout):
            part.eval()
        for part in (layer.attention, twin.attention):
            part.scaling *= 2
        assert torch.equal(layer(hidden), twin(hidden))
        mapped = torch.func.vmap(layer)(hidden[:, None])
        torch.testing.assert_close(mapped, torch.func.vmap(twin)(hidden[:, None]))
        model.train()
        assert torch.equal(layer(hidden), twin.train()(hidden))
    model.eval()
    model.set_attn_implementation("sdpa")
    plain.eval().set_attn_implementation("sdpa")
    assert torch.equal(logits(model, x), logits(plain, x))


def test_a_copy_computes_with_its_own_modules():
    model = vit()
    x = pixels(model)
    expected = logits(model, x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(fused(copied)) == 2
        assert torch.equal(logits(copied, x), expected)
        copied.load_state_dict({name: 2 * value for name, value in copied.state_dict().items()})
        assert close(logits(copied, x), logits(separate(copied), x))
        assert not close(logits(copied, x), expected)
        assert torch.equal(logits(model, x), expected)


def test_the_compiler_sees_the_operators():
    model, graphs = vit(), []
    x = pixels(model)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.inference_mode():
        torch.testing.assert_close(
            torch.compile(model, backend=backend, fullgraph=True)(pixel_values=x).logits, logits(model, x)
        )
    with torch.inference_mode():
        layer = model.vit.layers[0]
        layer.attention.o_proj = nn.Linear(192, 192)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values=x).logits, logits(model, x))
    assert sum("branch" in str(node.target) for node in graphs[-1].graph.nodes) == 2
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert targets.count("cap_hf.sparse_int8_attention_branch") == 2
    assert targets.count("cap_hf.sparse_int8_mlp_branch") == 2


def test_a_model_for_export_is_one_of_modules():
    model = vit()
    x = pixels(model)
    exported = torch.export.export(model, (x,), strict=False)
    with torch.no_grad():
        found, expected = exported.module()(x).logits, logits(model, x)
    # transformers gives a model for export an attention mask, with which attention is PyTorch's own.
    assert float((found - expected).norm() / expected.norm()) < 0.02


class Odd(nn.Module):
    """A block that is nearly one; `how` says what is different."""

    def __init__(self, layer, how):
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        layer = self.layer
        normal = layer.layernorm_before(hidden_states)
        y, _ = layer.attention(normal, attention_mask, **kwargs)
        x = y + (normal if self.how == "residual of the norm" else hidden_states)
        y = layer.mlp(layer.layernorm_after(x))
        return {"twice": 2 * y + x, "no residual": y, "first residual": y + hidden_states}.get(self.how, y + x)


@pytest.mark.parametrize("how", ["twice", "no residual", "first residual", "residual of the norm", "the same"])
def test_a_block_that_adds_up_otherwise_is_left(how):
    model = make_vit()
    model.vit.layers[1] = Odd(model.vit.layers[1], how).eval()
    x = pixels(model)
    optimize_for_inference(model, dtype="int8")
    assert [type(module).__name__ for module in fused(model)] == ["ViTLayer", *["Odd"] * (how == "the same")]
    assert close(logits(model, x), logits(separate(model), x))


def test_more_tokens_than_attention_takes_in_int8_are_left_to_pytorch(monkeypatch):
    layer = vit().vit.layers[0]
    monkeypatch.setattr(type(layer), "forward", lambda self, x: x)  # the modules would take too long
    with torch.inference_mode(), counted() as calls:
        layer(torch.zeros(1, 9, 192))
        assert len(calls) == 1
        layer(torch.zeros(1, MOST_KEYS + 1, 192))
    assert len(calls) == 1


class Shift(nn.Module):
    """It has one vector, as LayerScale, and adds it."""

    def __init__(self):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.randn(48))

    def forward(self, x):
        return x + self.lambda1


def test_what_adds_a_vector_is_no_layer_scale():
    model = build("Dinov2", mlp_ratio=2)
    model.dinov2.encoder.layer[1].layer_scale1 = Shift()
    optimize_for_inference(model, dtype="int8")
    assert [module for module in model.dinov2.encoder.layer if "forward" in vars(module)] == [
        model.dinov2.encoder.layer[0],
        model.dinov2.encoder.layer[2],
    ]


def test_nothing_is_left_on_a_model_that_was_looked_at():
    model = separate(vit())
    assert len(find_blocks(model, {"pixel_values": pixels(model)})) == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
