"""CAPCompressor: exact sparsity, zeros kept, several prunes from one collection, errors before any change."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import ARCHITECTURES, build, random_batches
from support.quadratics import inverse_of
from torch.utils.data import DataLoader

import cap_hf.collection.solver as solver_module
from cap_hf import CAPCompressor, CAPConfig, CAPError, export_onnx, find_targets, push_to_hub
from cap_hf.inference.example import check_size
from cap_hf.masks import differing_layers, find_pattern
from cap_hf.method import elimination
from cap_hf.method.inverses import invert
from cap_hf.method.panels import LostPivotError
from cap_hf.method.reconstruction import reconstruct


def collected(model, side=8, **config) -> CAPCompressor:
    batches = random_batches(model, side, sizes=(8, 8, 8, 8))
    return CAPCompressor(model, CAPConfig(num_grads=32, **config)).collect(batches)


def zeros_of(compressor: CAPCompressor) -> int:
    return sum(int((target.weight == 0).sum()) for target in compressor.targets)


def negative_zeros(weight: torch.Tensor) -> int:
    return int(((weight == 0) & torch.signbit(weight)).sum())


def total_of(compressor: CAPCompressor) -> int:
    return sum(target.weight.numel() for target in compressor.targets)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", ["cap", "obs", "sparsegpt", "wanda", "magnitude"])
def test_every_method_meets_the_sparsity_on_every_architecture(name, method):
    model = build(name)
    others = {
        key: value.clone()
        for key, value in model.state_dict().items()
        if key.removesuffix(".weight") not in {target.name for target in CAPCompressor(model).targets}
    }
    compressor = collected(model, ARCHITECTURES[name][1], method=method)
    for sparsity in (0.5, 0.9):
        report = compressor.prune(sparsity)
        assert zeros_of(compressor) == round(total_of(compressor) * sparsity) == report.num_zeros
        assert all(target.weight.isfinite().all() for target in compressor.targets)
        assert [layer.num_zeros for layer in report.layers] == [int((t.weight == 0).sum()) for t in compressor.targets]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in others.items())


@given(
    sparsity=st.floats(0, 0.999),
    allocation=st.sampled_from(["global", "uniform"]),
    selection=st.sampled_from(["marginal", "cumulative"]),
)
@settings(max_examples=25, deadline=None)
def test_sparsity_is_exact_to_the_weight(sparsity, allocation, selection):
    compressor = shared_compressor()
    report = compressor.prune(sparsity, allocation, selection)
    assert zeros_of(compressor) == report.num_zeros == round(total_of(compressor) * sparsity)
    if allocation == "uniform":
        assert all(abs(layer.num_zeros - sparsity * layer.num_weights) <= 1 for layer in report.layers)


@cache
def shared_compressor() -> CAPCompressor:
    """One collection serves all examples of the property test."""
    return collected(build("ViT"), fisher_block_size=8)


def test_the_weights_are_the_minimum_for_the_removed_set():
    model = build("ViT").double()
    compressor = collected(model, fisher_block_size=32)
    dense = {target.name: target.to_blocks(target.weight).clone() for target in compressor.targets}
    report = compressor.prune(0.7)
    for target, layer in zip(compressor.targets, report.layers, strict=True):
        fisher = compressor.fisher.damped(target, slice(None))
        new = target.to_blocks(target.weight.detach())
        expected = reconstruct(dense[target.name].detach(), fisher, new != 0)
        torch.testing.assert_close(new, expected)
        # And the reported loss is the quadratic form of the Fisher with its prior, without a damp.
        change = (new - dense[target.name].detach())[..., None]
        plain = compressor.fisher.damped(target, slice(None), 0.0)
        assert layer.loss == pytest.approx(float((change * (plain @ change)).sum()) / 2, rel=1e-6)


def test_one_collection_serves_any_order_of_sparsities():
    compressor = collected(build("ViT"))
    first = {}
    for sparsity in (0.5, 0.9):
        compressor.prune(sparsity)
        first[sparsity] = copy.deepcopy(compressor.model.state_dict())
    for sparsity in (0.9, 0.5):
        compressor.prune(sparsity)
        assert all(torch.equal(value, first[sparsity][key]) for key, value in compressor.model.state_dict().items())
    compressor.prune(0.0)
    assert all(
        torch.equal(value, build("ViT").state_dict()[key]) for key, value in compressor.model.state_dict().items()
    )


@pytest.mark.parametrize("method", ["cap", "obs", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_sparse_model_is_pruned_further_and_loses_no_zero(method, allocation):
    model = build("ViT")
    collected(model).prune(0.6)
    before = {target.name: target.weight == 0 for target in CAPCompressor(model).targets}
    compressor = collected(model, method=method)
    compressor.prune(0.8, allocation)
    assert zeros_of(compressor) == round(0.8 * total_of(compressor))
    for target in compressor.targets:
        assert (target.weight[before[target.name]] == 0).all()
    with pytest.raises(CAPError, match="sparse already"):
        compressor.prune(0.3)


@pytest.mark.parametrize("method", ["cap", "obs", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("allocation", ["global", "2:4"])
def test_pruned_weights_are_positive_zeros(method, allocation):
    """A mask that was multiplied on leaves -0.0 behind, which a compressed checkpoint has to keep."""
    model = build("ViT")
    for target in CAPCompressor(model).targets:
        target.weight.data.mul_(target.weight > target.weight.quantile(0.3))
    compressor = collected(model, method=method, allocation=allocation)
    assert any(negative_zeros(target.weight) for target in compressor.targets)
    compressor.prune(0.5 if allocation == "global" else None)
    assert not any(negative_zeros(target.weight) for target in compressor.targets)


@pytest.mark.parametrize("method", ["cap", "obs", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("allocation", ["2:4", "1:4", "4:8", "3:8"])
def test_n_m_holds_in_every_group(method, allocation):
    compressor = collected(build("ViT"), method=method, allocation=allocation)
    report = compressor.prune()
    n, m = map(int, allocation.split(":"))
    assert report.sparsity == 1 - n / m
    for target in compressor.targets:
        groups = target.weight.view(-1, m)
        assert ((groups != 0).sum(dim=1) == n).all()
    if allocation == "2:4":
        assert str(find_pattern(compressor.targets[0], compressor.targets[0].weight != 0)) == "2:4"


def test_n_m_on_convolutions_runs_over_input_channels():
    compressor = collected(build("ResNet"), 16, allocation="2:4")
    compressor.prune()
    for target in compressor.targets:
        groups = target.weight.movedim(1, -1).reshape(-1, 4)
        assert ((groups != 0).sum(dim=1) == 2).all()


def test_n_m_of_a_sparse_model_keeps_its_zeros():
    model = build("ViT")
    collected(model, method="magnitude").prune(0.7)
    before = {name: value == 0 for name, value in model.state_dict().items()}
    compressor = collected(model, allocation="2:4")
    compressor.prune()
    for target in compressor.targets:
        assert (target.weight[before[f"{target.name}.weight"]] == 0).all()
        assert ((target.weight.view(-1, 4) != 0).sum(dim=1) <= 2).all()


@pytest.mark.parametrize("method", ["cap", "obs", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize(("allocation", "pattern"), [("global", "1x4"), ("uniform", "1x4"), ("global", "1x8")])
def test_blocks_go_or_stay_as_a_whole(method, allocation, pattern):
    compressor = collected(build("ViT"), method=method, allocation=allocation, pattern=pattern)
    size = int(pattern[2:])
    for sparsity in (0.5, 0.77):
        report = compressor.prune(sparsity)
        assert zeros_of(compressor) == size * round(total_of(compressor) // size * sparsity) == report.num_zeros
        for target, layer in zip(compressor.targets, report.layers, strict=True):
            kept = (target.weight != 0).view(-1, size)
            assert torch.equal(kept.all(dim=1), kept.any(dim=1))
            assert layer.zero_blocks[pattern] == int((~kept.any(dim=1)).sum())
            if allocation == "uniform":
                assert layer.sparsity == pytest.approx(sparsity, abs=size / target.weight.numel())
    # Further, from what is sparse already, and from single zeros too, which stay.
    before = {target.name: target.weight == 0 for target in compressor.targets}
    further = collected(compressor.model, method=method, allocation=allocation, pattern=pattern)
    further.prune(0.9)
    assert all((target.weight[before[target.name]] == 0).all() for target in further.targets)
    assert zeros_of(further) == size * round(total_of(further) // size * 0.9)


@pytest.mark.parametrize("method", ["cap", "magnitude"])
def test_blocks_of_a_model_with_single_zeros(method):
    model = build("ViT")
    collected(model, method="magnitude").prune(0.5)
    before = {name: value == 0 for name, value in model.state_dict().items()}
    compressor = collected(model, method=method, pattern="1x4")
    report = compressor.prune(0.6)
    assert report.sparsity >= 0.6
    assert sum(layer.zero_blocks["1x4"] for layer in report.layers) >= round(total_of(compressor) // 4 * 0.6)
    assert all((target.weight[before[f"{target.name}.weight"]] == 0).all() for target in compressor.targets)


def test_blocks_of_convolutions_are_of_input_channels_and_odd_layers_stay_dense(caplog):
    model = build("ResNet")
    compressor = collected(model, 16, pattern="1x8")
    compressor.prune(0.7)
    pruned = {target.name for target in compressor.targets}
    for target in CAPCompressor(model).targets:
        if target.weight.shape[1] % 8:
            assert target.name not in pruned
            assert target.name in caplog.text
            assert (target.weight != 0).all()
        else:
            kept = target.weight.movedim(1, -1).reshape(-1, 8) != 0
            assert torch.equal(kept.all(dim=1), kept.any(dim=1))


def test_cap_beats_the_baselines_on_its_own_loss():
    """On the quadratic loss that all are judged by, the correlation-aware greedy is the best of them."""
    losses = {}
    for method in ("cap", "obs"):
        for update in ("joint", "independent", "none"):
            model = build("ViT")
            losses[method, update] = collected(model, method=method, weight_update=update).prune(0.6).loss
    assert losses["cap", "joint"] < losses["obs", "joint"] < losses["obs", "none"]
    assert losses["cap", "joint"] < losses["cap", "none"]
    assert losses["obs", "joint"] < losses["obs", "independent"]


def test_samples_per_grad_and_sampled_labels():
    model = build("ViT")
    batches = random_batches(model, 8, sizes=(8, 8))
    grouped = CAPCompressor(model, CAPConfig(num_grads=4, samples_per_grad=4)).collect(batches)
    assert grouped.fisher.count == 4
    with pytest.raises(CAPError, match="batch size 8 is not a multiple of samples_per_grad=3"):
        CAPCompressor(model, CAPConfig(num_grads=4, samples_per_grad=3)).collect(batches)
    sums = []
    for sizes in ((8, 8), (4, 4, 4, 4)):
        config = CAPConfig(num_grads=16, fisher_loss="sampled")
        pixels, labels = (torch.cat([batch[key] for batch in batches]) for key in ("pixel_values", "labels"))
        split = zip(pixels.split(sizes), labels.split(sizes), strict=True)
        parts = [{"pixel_values": p, "labels": label} for p, label in split]
        sums.append(CAPCompressor(model, config).collect(parts).fisher.sums)
    empirical = CAPCompressor(model, CAPConfig(num_grads=16)).collect(batches).fisher.sums
    for name in sums[0]:
        torch.testing.assert_close(sums[0][name].full(), sums[1][name].full(), rtol=1e-4, atol=1e-7)
    assert any(not torch.allclose(empirical[name].full(), sums[0][name].full(), rtol=0.01) for name in empirical)


def test_the_number_of_gradients_is_kept(caplog):
    model = build("ViT")
    batches = random_batches(model, 8, sizes=(8, 8, 8))
    assert CAPCompressor(model, CAPConfig(num_grads=12)).collect(batches).fisher.count == 12
    examples = [{key: batch[key][i] for key in batch} for batch in batches for i in range(8)]
    loader = DataLoader(examples, batch_size=5)
    assert CAPCompressor(model, CAPConfig(num_grads=100)).collect(loader).fisher.count == 24
    assert "ended after 24 of 100" in caplog.text


def test_several_chunks_equal_one(monkeypatch):
    results = []
    for size in (64 * 2**20, 8 * 16**2 * 3):
        monkeypatch.setattr(solver_module, "BATCH_BYTES", size)
        model = build("ViT")
        collected(model).prune(0.8)
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), None])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(CAPError, match=r"not in \[0, 1\)"):
        collected(build("ViT")).prune(sparsity)


def test_errors_leave_the_model_alone(monkeypatch):
    model = build("ViT")
    before = copy.deepcopy(model.state_dict())
    compressor = CAPCompressor(model)
    with pytest.raises(CAPError, match="call collect"):
        compressor.prune(0.5)
    with pytest.raises(CAPError, match="needs pixel_values and labels"):
        CAPCompressor(model, CAPConfig(fisher_loss="labels")).collect([{"pixel_values": torch.zeros(1, 3, 8, 8)}])
    with pytest.raises(CAPError, match="dataloader is empty"):
        compressor.collect([])
    with pytest.raises(CAPError, match="contradicts 2:4"):
        collected(model, allocation="2:4").prune(0.7)
    lost = collected(model)

    def lose(weights, *_):
        raise LostPivotError(torch.arange(len(weights)) >= min(1, len(weights) - 1))

    monkeypatch.setattr(elimination, "eliminate", lose)
    with pytest.raises(CAPError, match=r"pivot of vit.layers.0.attention.q_proj \(block 1\): raise the damp"):
        lost.prune(0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_fisher_that_is_not_invertible_names_a_damp_that_does():
    # 4 gradient samples leave a block of 16 singular; an absolute damp far below rounding does not mend that.
    model = build("ViT")
    config = CAPConfig(num_grads=4, fisher_prior="identity", damp=1e-30, absolute_damp=True)
    compressor = CAPCompressor(model, config).collect(random_batches(model, 8))
    with pytest.raises(CAPError, match=r"q_proj \(block \d+\) cannot be inverted with damp=1e-30: --damp ") as caught:
        compressor.prune(0.5)
    suggestion = float(str(caught.value).split("--damp ")[1].split()[0])
    target = compressor.targets[0]
    assert invert(compressor.fisher.damped(target, slice(0, 1), suggestion)).isfinite().all()


def test_half_precision_is_refused():
    with pytest.raises(CAPError, match="load it in float32"):
        collected(build("ViT").to(torch.bfloat16))


def test_zeros_do_not_make_up_for_others():
    """The first removals of a sparse model are those of its survivors' own Fisher."""
    for method in ("obs", "cap"):
        model = build("ViT")
        collected(model, method="magnitude").prune(0.5)
        compressor = collected(model, method=method, include=["vit.layers.0.mlp.fc1"], fisher_block_size=8)
        compressor.prune(0.9)
        (target,) = compressor.targets
        weights = compressor.paths.weights[target.name].double()
        fisher = compressor.fisher.damped(target, slice(None))
        order, losses = compressor.paths.orders[target.name], compressor.paths.losses[target.name]
        for block in range(target.num_blocks):
            alive = weights[block].nonzero()[:, 0]
            if not len(alive):
                continue
            inverse = inverse_of(fisher[block][alive][:, alive])
            costs = weights[block][alive].square() / inverse.diagonal() / 2
            zeros = target.block_size - len(alive)
            assert int(order[block, zeros]) == int(alive[costs.argmin()])
            assert float(losses[block, zeros]) == pytest.approx(float(costs.min()), rel=1e-4)


def test_changing_the_pattern_eliminates_anew():
    compressor = collected(build("ViT"))
    compressor.prune(0.5)
    compressor.prune(allocation="2:4")
    assert compressor.config.allocation == "2:4"
    assert all(((target.weight.view(-1, 4) != 0).sum(dim=1) == 2).all() for target in compressor.targets)


def test_gradients_are_collected_in_eval_mode():
    sums = []
    for training in (False, True):
        model = build("ViT", hidden_dropout_prob=0.5).train(training)
        sums.append(collected(model).fisher.sums)
    assert all(torch.equal(sums[0][name].full(), sums[1][name].full()) for name in sums[0])


def test_training_mode_and_hooks_are_put_back():
    model = build("ViT").train()
    collected(model)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_batch_norm_is_estimated_anew_from_the_first_examples():
    """All that a dataloader has is more than is needed: so many as are asked for, whatever the batch size."""
    model = build("ResNet")
    (batch,) = random_batches(model, 16, (24,))
    rows = [{name: value[index] for name, value in batch.items()} for index in range(24)]
    compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(DataLoader(rows, batch_size=8))
    compressor.prune(0.5)
    names = compressor.recalibrate_batch_norm(DataLoader(rows, batch_size=8), num_examples=12)
    assert names == [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    stem = model.resnet.embedder.embedder
    with torch.no_grad():
        values = stem.convolution(batch["pixel_values"][:12]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(stem.normalization.running_mean, values.mean(1))
    torch.testing.assert_close(stem.normalization.running_var, values.var(1))


def test_a_prune_begins_with_what_was_there_before_a_refit():
    """Weights, biases and statistics of batch norm; and a report tells of the refit."""
    model = build("ResNet")
    batches = random_batches(model, 16, (12, 12))
    compressor = CAPCompressor(model, CAPConfig(num_grads=24, refit_examples=16, allocation="2:4"))
    with pytest.raises(CAPError, match=r"call prune\(sparsity\) before refit"):
        compressor.collect(batches).refit(batches)
    assert compressor.prune().refit is None
    pruned = copy.deepcopy(model.state_dict())
    losses = [layer.loss for layer in compressor.report.layers]
    report = compressor.refit(batches)
    assert report is compressor.report
    assert report.to_dict()["refit"] == {"examples": 16, "ridge": compressor.config.refit_ridge, "left_alone": []}
    assert [layer.loss for layer in report.layers] == losses
    assert differing_layers(compressor.targets, report.to_dict()) == []
    for target in compressor.targets:
        assert torch.equal(target.weight == 0, pruned[f"{target.name}.weight"] == 0)
        assert not torch.equal(target.weight, pruned[f"{target.name}.weight"])
    compressor.recalibrate_batch_norm(batches, num_examples=16)
    refitted = copy.deepcopy(model.state_dict())
    # A refit that fails changes nothing.
    with pytest.raises(CAPError, match="is not finite: it cannot be refitted"):
        compressor.refit([{"pixel_values": torch.full((4, 3, 16, 16), torch.nan)}])
    assert all(torch.equal(value, refitted[name]) for name, value in model.state_dict().items())
    assert compressor.prune().refit is None
    assert all(torch.equal(value, pruned[name]) for name, value in model.state_dict().items())


def test_biases_are_put_back_and_inference_mode_does_not_matter():
    model = build("ViT")
    batches = random_batches(model, 8, (12,))
    compressor = CAPCompressor(model, CAPConfig(method="magnitude", refit_examples=12))
    compressor.prune(0.5)
    compressor.refit(batches)
    expected = copy.deepcopy(model.state_dict())
    compressor.prune(0.0)
    assert all(torch.equal(value, build("ViT").state_dict()[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        compressor.prune(0.5)
        compressor.refit(random_batches(model, 8, (12,)))
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.vit.layers[1].mlp.fc2.bias, build("ViT").vit.layers[1].mlp.fc2.bias)


def test_a_model_that_device_map_has_spread_is_refused(tmp_path):
    build("ViT").save_pretrained(tmp_path / "dense")
    kind, parts = type(build("ViT")), ("vit.embeddings", "vit.layers.0", "vit.layernorm", "classifier")
    places = dict.fromkeys(parts, "cpu") | {"vit.layers.1": "disk"}
    spread = kind.from_pretrained(tmp_path / "dense", device_map=places, offload_folder=tmp_path / "offload")
    with pytest.raises(
        CAPError, match="device_map has put parts of the model on cpu, disk: load it without device_map"
    ):
        collected(spread)
    whole = kind.from_pretrained(tmp_path / "dense", device_map="cpu")
    assert zeros_of(collected(whole)) == 0


def test_statistics_of_batch_norm_that_do_not_fit_are_as_before():
    model = build("ResNet")
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True, dtype=torch.float16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [{"pixel_values": 1e6 * torch.randn(3, 16, 16)} for _ in range(8)]
    with pytest.raises(CAPError, match=r"running_mean holds .*, too much for torch.float16"):
        compressor.recalibrate_batch_norm(DataLoader(rows, batch_size=4), num_examples=8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda model: CAPCompressor(model, {"method": "cap"}),
            "^config={'method': 'cap'} is of type dict and no CAPConfig",
        ),
        (lambda model: CAPCompressor(model, "cap"), "^config='cap' is of type str and no CAPConfig: pass CAPConfig"),
        (lambda model: CAPCompressor(model, {}), "^config={} is of type dict"),
        (lambda model: CAPCompressor(model, resources="4GB"), "^resources='4GB' is of type str and no Resources"),
        (lambda model: CAPCompressor(model, dtype="bfloat16"), "^dtype='bfloat16' is of type str and no dtype"),
        (lambda model: CAPCompressor(model).collect([], "x"), "^checkpointing='x' is of type str and no Checkpointing"),
        (lambda model: find_targets("vit"), "^model='vit' is of type str and no Module"),
        (
            lambda model: find_targets(model, pattern="2:4"),
            "^pattern='2:4' is of type str and no NMPattern or Block",
        ),
        (lambda model: find_targets(model, include=3), "^include=3 is of type int and no Sequence"),
        (lambda model: find_targets(model, None), "^block_size=None is neither 'row' nor a number"),
        (lambda model: push_to_hub(None, "a/b"), "^None is no name of a checkpoint's folder"),
        (lambda model: push_to_hub("out", None), "^None is no name of a repository"),
        (lambda model: export_onnx(model, None), "^None is no name of a folder"),
        (lambda model: CAPConfig.from_dict(None), "^None holds no fields of CAPConfig"),
        (lambda model: check_size(1.5), "^image_size=1.5 is no size"),
        (lambda model: magnitude(model).prune("0.5"), "^sparsity '0.5' is of type str: pass a number, such as 0.5"),
        (lambda model: magnitude(model, allocation="2:4").prune("0.5"), "^sparsity '0.5' is of type str"),
        (lambda model: magnitude(model).save_pretrained(None), "^None is no name of a folder, but of type NoneType"),
        (lambda model: magnitude(model).save_pretrained(3), "^3 is no name of a folder"),
        (lambda model: CAPConfig(damp="0.1"), "^damp='0.1' must be a number"),
        (lambda model: CAPConfig(patch_weight=None), "^patch_weight=None must be a number"),
        (lambda model: CAPConfig(exclude=3), "^exclude=3 must be a list of patterns"),
    ],
)
def test_a_value_of_another_type_is_one_line(call, line):
    with pytest.raises(CAPError, match=line):
        call(build("ViT"))


def magnitude(model, **config) -> CAPCompressor:
    return CAPCompressor(model, CAPConfig(method="magnitude", **config))


def test_inference_mode_changes_nothing():
    expected, found = build("ViT"), build("ViT")
    collected(expected).prune(0.5)
    with torch.inference_mode():
        # The batches are made inside.
        collected(found).prune(0.5)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    with (
        torch.inference_mode(),
        pytest.raises(CAPError, match=r"made inside torch\.inference_mode\(\).*: load it outside"),
    ):
        collected(build("ViT"))


def test_a_sparsity_below_the_models_is_known_before_anything_is_collected():
    compressor = collected(build("ViT"))
    compressor.check_sparsity(0.5)
    compressor.prune(0.9)
    with pytest.raises(CAPError, match="sparse already: sparsity 0.5 would be less"):
        CAPCompressor(compressor.model).check_sparsity(0.5)
    # This one goes on from the weights at `collect`.
    compressor.prune(0.5)
