"""No zero comes back, whatever the optimizer and wherever the layer."""

import pytest
import torch
from support.recovery import assert_same_zeros, examples, make_trainer, sparse_vit, tiny_vit, zeros
from transformers import ResNetConfig, ResNetForImageClassification

from cap_hf.data.images import collate
from cap_hf.errors import CAPError
from cap_hf.masks import count_zeros
from cap_hf.recovery.mask_holder import MaskHolder, model_sparsity
from cap_hf.targets import find_targets


def test_masks_hold_under_a_gradient_scaler_that_skips_steps():
    # fp16 training needs CUDA, its scaler does not: steps with infinite gradients are skipped, others are held.
    model = sparse_vit()
    before = zeros(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    holder, scaler = MaskHolder(model), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    holder.attach(optimizer)
    batch = collate(examples(16))
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model(**batch).loss).backward()
        if step == 1:
            model.vit.layers[0].mlp.fc1.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        assert_same_zeros(model, before)
    assert scaler.get_scale() == 2.0**15


def test_gradients_of_pruned_weights_do_not_count_in_clipping():
    model = sparse_vit()
    holder = MaskHolder(model)
    holder.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    model(**collate(examples(8))).loss.backward()
    for name, zero in zeros(model).items():
        gradient = model.get_submodule(name).weight.grad
        assert not gradient[zero].any()
        assert gradient.any()


def test_momentum_of_newly_pruned_weights_is_forgotten():
    model = tiny_vit()
    holder, optimizer = MaskHolder(model), torch.optim.AdamW(model.parameters())
    holder.attach(optimizer)
    model(**collate(examples(8))).loss.backward()
    optimizer.step()
    weight = model.vit.layers[0].mlp.fc1.weight
    with torch.no_grad():
        weight[0] = 0
    holder.take()
    holder.clear_state(optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[weight][name][0].any()
        assert optimizer.state[weight][name][1].any()
    assert optimizer.state[weight]["step"] == 1


def test_layers_that_are_pruned_away_and_layers_outside_the_encoder_stay_zero(tmp_path):
    model = sparse_vit()
    with torch.no_grad():
        model.vit.layers[0].attention.q_proj.weight.zero_()
        model.classifier.weight[:, ::2] = 0
    make_trainer(tmp_path, model).train()
    assert not model.vit.layers[0].attention.q_proj.weight.any()
    assert not model.classifier.weight[:, ::2].any()
    assert (model.classifier.weight[:, 1::2] != 0).all()


def test_a_new_classifier_of_zeros_is_trained(tmp_path):
    model = sparse_vit()
    torch.nn.init.zeros_(model.classifier.weight)
    make_trainer(tmp_path, model).train()
    assert model.classifier.weight.any()


def make_optimizer(name, model):
    parameters = model.parameters()
    return {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5),
        "rmsprop": lambda: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
        "adamax": lambda: torch.optim.Adamax(parameters, lr=0.01),
        "adafactor": lambda: torch.optim.Adafactor(parameters, lr=0.01, weight_decay=0.1),
    }[name]()


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "adamax", "adafactor"])
def test_no_zero_comes_back_under_any_optimizer(tmp_path, name):
    model = sparse_vit()
    before, start = zeros(model), {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(tmp_path, model, optimizers=(make_optimizer(name, model), None)).train()
    assert_same_zeros(model, before)
    assert not torch.equal(model.vit.layers[0].mlp.fc1.weight, start["vit.layers.0.mlp.fc1.weight"])


def test_resnet_keeps_the_zeros_of_its_convolutions(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(
        depths=[1, 1], hidden_sizes=[8, 16], embedding_size=4, layer_type="basic", num_labels=4, num_channels=1
    )
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight[:, :, ::2] = 0
    before = zeros(model)
    make_trainer(tmp_path, model, data=examples(size=16), ema_decay=0.5, max_steps=3).train()
    assert_same_zeros(model, before)


def test_layers_that_share_a_weight_are_held_once():
    model = sparse_vit()
    first, second = (layer.mlp.fc1 for layer in model.vit.layers)
    second.weight = first.weight
    holder = MaskHolder(model)
    names = [target.name for target in holder.held]
    assert "vit.layers.0.mlp.fc1" in names
    assert "vit.layers.1.mlp.fc1" not in names
    before = first.weight == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    holder.attach(optimizer)
    for _ in range(2):
        model(**collate(examples(8))).loss.backward()
        optimizer.step()
    assert torch.equal(first.weight == 0, before)


def test_zeros_are_counted():
    model = sparse_vit(0.25)
    zeros_, total = count_zeros(find_targets(model))
    assert total == sum(target.weight.numel() for target in find_targets(model))
    assert zeros_ == sum(round(0.25 * target.weight.numel()) for target in find_targets(model))
    assert model_sparsity(model) == zeros_ / total
    assert model_sparsity(tiny_vit()) == 0


def test_an_optimizer_without_hooks_is_one_line():
    class Own:
        pass

    with pytest.raises(CAPError, match="Own has no step hooks to hold the masks with"):
        MaskHolder(sparse_vit()).attach(Own())
