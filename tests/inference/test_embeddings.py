"""Patches in int8, and positions that are kept: what the modules give, for as long as their weights are the same."""

import copy
import pickle

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import has_instruction_set, logits, make_vit, pixels
from support.int8 import INT8_INSTRUCTION_SETS, make_block_weight
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import set_seed

from cap_hf.inference import embeddings
from cap_hf.inference.embeddings import cuts_patches, find_patches, sparse_int8_patches, speed_up_embeddings
from cap_hf.inference.int8_packing import pack_int8
from cap_hf.inference.linear import resident_bytes
from cap_hf.inference.operators import has_int8_kernel, sparse_int8_linear


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_int8_kernel()


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    monkeypatch.setattr(embeddings, "time_in_turns", lambda *_: [[1.0], [0.5]])


def supported(name):
    one = pack_int8(torch.ones(1, 1))
    return not name or has_instruction_set(sparse_int8_linear, torch.ones(1, 1), one, None, name)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(0, 3),
    channels=st.integers(1, 4),
    patch=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rest=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    rows=st.integers(1, 20),
    biased=st.booleans(),
    name=st.sampled_from([*INT8_INSTRUCTION_SETS, ""]),
)
def test_patches_have_the_bits_of_their_product(seed, images, channels, patch, grid, rest, rows, biased, name):
    if not supported(name):
        return
    height, width = (size * count + min(left, size - 1) for size, count, left in zip(patch, grid, rest, strict=True))
    x = torch.randn(images, channels, height, width, generator=torch.Generator().manual_seed(seed))
    weight = pack_int8(make_block_weight(rows, channels * patch[0] * patch[1], 0.2, seed))
    bias = torch.arange(rows) / 3 if biased else None
    found = sparse_int8_patches(x, weight, bias, patch, name)
    cut = x.unfold(2, patch[0], patch[0]).unfold(3, patch[1], patch[1]).permute(0, 2, 3, 1, 4, 5)
    rows_of_patches = cut.reshape(images, grid[0] * grid[1], channels * patch[0] * patch[1])
    assert torch.equal(found, sparse_int8_linear(rows_of_patches, weight, bias, name))


def test_more_patches_than_fit_the_working_memory():
    """Its 8 MiB hold 2,720 tokens of 3,072 numbers."""
    x, weight = torch.randn(3, 3, 1030, 1060), pack_int8(make_block_weight(8, 3072, 0.5))
    cut = functional.unfold(x[..., :1024, :1056], 32, stride=32).transpose(1, 2)
    assert cut.shape[0] * cut.shape[1] > 2720
    assert torch.equal(sparse_int8_patches(x, weight, None, (32, 32)), sparse_int8_linear(cut, weight))


def test_images_that_do_not_fit_are_refused():
    weight = pack_int8(make_block_weight(8, 12, 0.0))
    with pytest.raises(RuntimeError, match="patches of 2 x 3 of images"):
        sparse_int8_patches(torch.randn(1, 3, 8, 9), weight, None, (2, 3))
    with pytest.raises(RuntimeError, match="x must have 4 dimensions, not 3"):
        sparse_int8_patches(torch.randn(3, 8, 9), weight, None, (2, 2))
    with pytest.raises(RuntimeError, match="patches of 0 x 4"):
        sparse_int8_patches(torch.randn(1, 3, 8, 9), weight, None, (0, 4))


def test_the_operator_is_registered_as_pytorch_asks():
    weight = pack_int8(make_block_weight(8, 12, 0.0))
    args = (torch.randn(2, 3, 8, 9), *list(vars(weight).values())[:6], None, 8, 12, weight.row_block, weight.col_block)
    torch.library.opcheck(
        torch.ops.cap_hf.sparse_int8_patches.default, (*args, 2, 2, 0), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kernel_size": 4, "stride": 4}, True),
        ({"kernel_size": (2, 4), "stride": (2, 4)}, True),
        ({"kernel_size": 4, "stride": 4, "padding": "valid"}, True),
        ({"kernel_size": 4, "stride": 2}, False),
        ({"kernel_size": 3, "stride": 4}, False),
        ({"kernel_size": 4, "stride": 4, "padding": 1}, False),
        ({"kernel_size": 4, "stride": 4, "dilation": 2}, False),
        ({"kernel_size": 4, "stride": 4, "groups": 2}, False),
        ({"kernel_size": 4, "stride": 4, "dtype": torch.bfloat16}, False),
    ],
)
def test_only_a_convolution_that_cuts_patches_is_one(arguments, expected):
    assert cuts_patches(nn.Conv2d(4, 6, **arguments)) == expected


def sped_up(model):
    speed_up_embeddings(model, {"pixel_values": pixels(model)})
    return model


def convolution_of(model):
    return model.vit.embeddings.patch_embeddings.projection


def test_patches_are_about_what_the_convolution_gives_and_lie_as_it_says():
    model, plain = sped_up(make_vit()), make_vit()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        found, expected = convolution_of(model)(x), convolution_of(plain)(x)
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert not torch.equal(found, expected)
    assert torch.equal(
        model.state_dict()[name := "vit.embeddings.patch_embeddings.projection.weight"], plain.state_dict()[name]
    )
    assert resident_bytes(model) > resident_bytes(plain)


def test_a_convolution_that_is_faster_stays(monkeypatch):
    monkeypatch.setattr(embeddings, "time_in_turns", lambda *_: [[1.0], [0.96]])
    assert "forward" not in vars(convolution_of(sped_up(make_vit())))


def test_an_image_that_is_smaller_than_a_patch_is_the_convolutions_own_error():
    model = sped_up(make_vit())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        convolution_of(model)(torch.randn(1, 3, 3, 8))


def test_of_what_was_made_in_inference_mode_nothing_is_kept():
    with torch.inference_mode():
        model, plain = sped_up(make_vit()), make_vit()
        for each in (model, plain):
            convolution_of(each).weight.mul_(3)
    x = pixels(model)
    assert torch.equal(logits(model, x), logits(plain, x))


def test_fake_images_give_fake_positions():
    model, x = dinov2(), torch.randn(1, 3, 32, 32)
    speed_up_embeddings(model, {"pixel_values": x})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert model(pixel_values=mode.from_tensor(x)).logits.shape == (1, 3)


def test_one_that_does_not_get_the_images_is_left():
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 2, 2)

        def forward(self, pixel_values):
            return self.second(self.first(pixel_values))

    model = Later().eval()
    assert list(find_patches(model, {"pixel_values": torch.randn(1, 3, 8, 8)})) == [model.first]
    assert not model.first._forward_pre_hooks


def test_a_weight_that_is_changed_is_computed_with():
    model, plain = sped_up(make_vit()), make_vit()
    x = pixels(model)
    doubled = {name: 2 * value for name, value in plain.state_dict().items()}
    for each in (model, plain):
        each.load_state_dict(doubled)
    assert torch.equal(logits(model, x), logits(plain, x))


def test_a_copy_has_its_own():
    model = sped_up(make_vit())
    x = pixels(model)
    expected = logits(model, x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied, x), expected)
        plain = make_vit()
        for each in (copied, plain):
            each.load_state_dict({name: 2 * value for name, value in plain.state_dict().items()})
        assert torch.equal(logits(copied, x), logits(plain, x))
    assert torch.equal(logits(model, x), expected)


def test_with_gradients_and_in_the_compiler_it_is_the_convolution():
    model, plain = sped_up(make_vit()), make_vit()
    x = pixels(model)
    assert torch.equal(convolution_of(model)(x), convolution_of(plain)(x))
    with torch.inference_mode():
        compiled = torch.compile(convolution_of(model), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), convolution_of(plain)(x))


def dinov2():
    set_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=4, num_labels=3
    )
    return transformers.Dinov2ForImageClassification(config).eval()


def counted(monkeypatch):
    """The sizes for which positions were computed."""
    kind, calls = transformers.models.dinov2.modeling_dinov2.Dinov2Embeddings, []
    original = kind.interpolate_pos_encoding
    monkeypatch.setattr(
        kind, "interpolate_pos_encoding", lambda self, *args: calls.append(args[1:]) or original(self, *args)
    )
    return calls


def test_positions_are_computed_once_for_a_size(monkeypatch):
    monkeypatch.setattr(embeddings, "time_in_turns", lambda *_: [[1.0], [2.0]])
    calls, model, plain = counted(monkeypatch), dinov2(), dinov2()
    speed_up_embeddings(model, {"pixel_values": torch.randn(1, 3, 28, 28)})
    for side, count in ((32, 2), (32, 0), (20, 2), (32, 0), *((side, 2) for side in range(36, 64, 4)), (32, 2)):
        for images in (1, 3):
            x = torch.randn(images, 3, side, side)
            expected = logits(plain, x)
            calls.clear()
            assert torch.equal(logits(model, x), expected)
            assert calls == [(side, side)] * (count if images == 1 else 0)


def test_positions_are_those_of_height_and_width():
    """Of images that have the same number of patches, in another shape."""
    model, plain = dinov2(), dinov2()
    speed_up_embeddings(model, {"pixel_values": torch.randn(1, 3, 28, 28)})
    vars(model.dinov2.embeddings.patch_embeddings.projection).pop("forward", None)
    for height, width in ((48, 32), (32, 48), (64, 24)):
        x = torch.randn(1, 3, height, width)
        assert torch.equal(logits(model, x), logits(plain, x))


def test_positions_may_be_written_to_by_their_taker():
    model = dinov2()
    speed_up_embeddings(model, {"pixel_values": torch.randn(1, 3, 28, 28)})
    tokens = torch.randn(1, 65, 24)
    with torch.no_grad():
        expected = model.dinov2.embeddings.interpolate_pos_encoding(tokens, 32, 32).clone()
        for _ in range(2):
            found = model.dinov2.embeddings.interpolate_pos_encoding(tokens, 32, 32)
            assert torch.equal(found, expected)
            found.zero_()
        assert torch.equal(model.dinov2.embeddings.interpolate_pos_encoding(tokens, height=32, width=32), expected)


def test_a_method_of_the_instance_stays():
    model = dinov2()
    model.dinov2.embeddings.interpolate_pos_encoding = own = lambda embeddings, *size: embeddings
    speed_up_embeddings(model, {"pixel_values": torch.randn(1, 3, 28, 28), "flag": True})
    assert model.dinov2.embeddings.interpolate_pos_encoding is own


def test_positions_that_are_changed_are_computed_anew(monkeypatch):
    monkeypatch.setattr(embeddings, "time_in_turns", lambda *_: [[1.0], [2.0]])
    model, plain, x = dinov2(), dinov2(), torch.randn(1, 3, 32, 32)
    speed_up_embeddings(model, {"pixel_values": x})
    logits(model, x)
    copied = copy.deepcopy(model)
    other = {name: value + 1 for name, value in plain.state_dict().items()}
    for change in (
        lambda each: each.dinov2.embeddings.position_embeddings.mul_(3),
        lambda each: setattr(each.dinov2.embeddings, "position_embeddings", nn.Parameter(torch.ones(1, 50, 24))),
        lambda each: each.load_state_dict(other),
    ):
        with torch.no_grad():
            for each in (model, plain, copied):
                change(each)
        expected = logits(plain, x)
        assert torch.equal(logits(model, x), expected)
        assert torch.equal(logits(copied, x), expected)


def test_positions_that_depend_on_what_is_seen_are_computed_at_each_call(monkeypatch):
    monkeypatch.setattr(embeddings, "time_in_turns", lambda *_: [[1.0], [2.0]])
    kind = transformers.models.dinov2.modeling_dinov2.Dinov2Embeddings
    monkeypatch.setattr(kind, "interpolate_pos_encoding", lambda self, embeddings, *size: 2 * embeddings)
    model, plain = dinov2(), dinov2()
    speed_up_embeddings(model, {"pixel_values": torch.randn(1, 3, 28, 28)})
    for _ in range(3):
        x = torch.randn(1, 3, 28, 28)
        assert torch.equal(logits(model, x), logits(plain, x))


def test_positions_of_an_embedding_layer_are_kept_and_seen_to_change():
    set_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=4
    )
    model, x = transformers.CLIPVisionModel(config).eval(), torch.randn(1, 3, 40, 32)
    plain = copy.deepcopy(model)
    speed_up_embeddings(model, {"pixel_values": torch.randn(1, 3, 28, 28)})
    for _ in range(2):
        with torch.no_grad():
            found, expected = (each(pixel_values=x, interpolate_pos_encoding=True)[0] for each in (model, plain))
            torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
            before = expected
            for each in (model, plain):
                each.embeddings.position_embedding.weight.add_(
                    torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
                )
    assert not torch.allclose(before, plain(pixel_values=x, interpolate_pos_encoding=True)[0], rtol=0.1, atol=0.1)


def test_gradients_go_through_positions():
    model, x = dinov2(), torch.randn(1, 3, 32, 32)
    speed_up_embeddings(model, {"pixel_values": x})
    logits(model, x)
    model(pixel_values=x).logits.sum().backward()
    assert float(model.dinov2.embeddings.position_embeddings.grad.abs().sum()) > 0
