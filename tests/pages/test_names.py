"""Where layers lie, by the names that models of several families give them."""

import pytest
from support.models import ARCHITECTURES, build

from cap_hf.pages.names import ORDER, kinds_in_order, places_of
from cap_hf.targets import find_targets


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit.encoder.layer.3.attention.attention.query", "q"),
        ("vit.encoder.layer.3.attention.output.dense", "o"),
        ("vit.encoder.layer.3.intermediate.dense", "fc1"),
        ("vit.encoder.layer.3.output.dense", "fc2"),
        ("vision_model.encoder.layers.0.self_attn.k_proj", "k"),
        ("vision_model.encoder.layers.0.self_attn.out_proj", "o"),
        ("timm_model.blocks.11.attn.qkv", "qkv"),
        ("timm_model.blocks.11.mlp.fc2", "fc2"),
        ("dinov2.encoder.layer.0.mlp.weights_in", "mlp.weights_in"),
        ("monkey", "monkey"),
    ],
)
def test_kinds(name, kind):
    assert places_of([name])[0] == (0, kind)


def test_blocks_are_counted_in_the_order_of_the_model():
    names = [
        f"encoder.layers.{stage}.blocks.{block}.{end}" for stage in (0, 1) for block in (0, 1) for end in ("fc1", "fc2")
    ]
    assert places_of(names) == [(depth, kind) for depth in range(4) for kind in ("fc1", "fc2")]


def test_layers_of_one_block_never_share_a_place():
    names = ["layer.0.self.out_proj", "layer.0.cross.out_proj", "layer.0.third.out_proj", "a.fc1", "b.fc1"]
    found = places_of(names)
    assert len(set(found)) == len(names)
    assert [place.kind for place in found[:2]] == ["o", "cross.out_proj"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_of_every_family_has_its_own_place(name):
    targets = [target.name for target in find_targets(build(name))]
    assert len(set(places_of(targets))) == len(targets)


def test_kinds_stand_in_the_order_of_a_block():
    places = places_of(["layer.0.fc2", "layer.0.fc1", "layer.0.v_proj", "layer.0.q_proj", "layer.0.other"])
    assert kinds_in_order([place.kind for place in places]) == ["q", "v", "fc1", "fc2", "other"]
    assert ORDER[0] == "q"
