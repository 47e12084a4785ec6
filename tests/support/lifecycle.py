"""What has to hold for a model of any family: its gradients, its zeros, its files, its sparse layers."""

import copy
import json
from fnmatch import fnmatchcase

import torch
from torch import nn

from cap_hf import CAPCompressor, CAPConfig, find_targets, optimize_for_inference
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.collection.running import backward, frozen
from cap_hf.commands.main import main
from cap_hf.masks import take_masks
from cap_hf.method.gradients import GradientSamples
from cap_hf.outputs import features_of
from cap_hf.targets import left_alone
from cap_hf.towers import prefix_tokens, see
from support.recovery import make_trainer


def outputs(model, batch):
    """Every tensor that a model returns for a batch."""
    with torch.no_grad():
        found = see(model, batch)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def assert_same_outputs(model, other, batch, tolerance=1e-4):
    first, second = outputs(model, batch), outputs(other, batch)
    assert first
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.isfinite().all()
        torch.testing.assert_close(second[name], value, rtol=tolerance, atol=tolerance)


def assert_gradient_samples(model, batch, include=None):
    """The hooks' gradient samples of a batch are autograd's gradients of single examples, for every target."""
    model = model.double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    targets = find_targets(model, include=include)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        parts = features_of(see(model, batch), prefix_tokens(model))
    weights = {name: torch.randn(part.shape[1:], generator=generator).double() for name, part in parts.items()}

    def loss(outputs, labels, draws):
        parts = features_of(outputs, prefix_tokens(model))
        return sum((part * weights[name]).sum() for name, part in parts.items())

    found = {}

    def sink(target, gradients):
        found[target.name] = target.weight.new_empty(gradients.samples, len(target.weight), target.row_size)
        gradients.rows(0, len(target.weight), found[target.name])

    size = len(batch["pixel_values"])
    with frozen(model), GradientSamples(targets, sink) as hooks:
        hooks.start(size)
        backward(model, batch, loss)
    assert sorted(found) == sorted(target.name for target in targets)
    for example in range(size):
        single = {name: value[example : example + 1] for name, value in batch.items()}
        with frozen(model):
            for target in targets:
                target.weight.requires_grad_(True)
            backward(model, single, loss)
        for target in targets:
            rows = found[target.name][example].view(target.num_blocks, target.block_size)
            torch.testing.assert_close(rows, target.to_blocks(target.weight.grad), rtol=1e-6, atol=1e-9)
            target.weight.grad = None


def prune(model, data, sparsity, **config):
    """A compressor that has pruned a model from a few examples, to exactly what it was told."""
    examples = sum(len(batch["pixel_values"]) for batch in data)
    compressor = CAPCompressor(model, CAPConfig(num_grads=examples, **config), disable_tqdm=True).collect(data)
    compressor.prune(sparsity)
    weights = sum(target.weight.numel() for target in compressor.targets)
    zeros = sum(int((target.weight == 0).sum()) for target in compressor.targets)
    assert zeros == round(weights * (0.5 if sparsity is None else sparsity))
    return compressor


def assert_two_four(model, data, exclude, include=None):
    """Every group of 4 input channels of every target has 2 zeros, and what was excluded has none."""
    names = [target.name for target in find_targets(model, include=include)]
    left = {name for name in names if any(fnmatchcase(name, glob) for glob in exclude)}
    compressor = prune(model, data, None, allocation="2:4", include=include, exclude=exclude or None)
    assert {target.name for target in compressor.targets} == set(names) - left
    for target in compressor.targets:
        rows = target.weight.movedim(1, -1).reshape(-1, 4)
        assert torch.equal((rows == 0).sum(1), torch.full((len(rows),), 2))
    modules = dict(model.named_modules())
    assert all((modules[name].weight != 0).all() for name in left)


def assert_survives_the_disk(compressor, batch, folder):
    """Saved, compressed, and loaded by `from_pretrained` of its class, it is the same model, and inspect knows it."""
    model, masks = compressor.model, take_masks(compressor.targets)
    compressor.save_pretrained(folder / "plain")
    compress_checkpoint(folder / "plain", folder / "compressed")
    plain, compressed = (
        sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) for name in ("plain", "compressed")
    )
    assert compressed < plain
    for name in ("plain", "compressed"):
        loaded = type(model).from_pretrained(folder / name).eval()
        state = loaded.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        # Convolutions round differently where their weights lie elsewhere in memory.
        assert_same_outputs(model, loaded, batch, 1e-5)
        again = take_masks(find_targets(loaded, include=compressor.config.include))
        assert list(again) == list(masks)
        assert all(torch.equal(mask, again[target]) for target, mask in masks.items())
    command = ["inspect", "--model_name_or_path", str(folder / "compressed"), "--output_dir", str(folder / "inspected")]
    assert main(command) == 0
    report = json.loads((folder / "inspected" / "inspect.json").read_text())
    assert report["architecture"] == type(model).__name__
    assert report["num_zeros"] == sum(int((target.weight == 0).sum()) for target in compressor.targets)
    assert report["layers_unlike_report"] == []
    assert report["left_alone"] == left_alone(model, find_targets(model))


def assert_recovers(compressor, data, folder):
    """A step of training moves what is left of every target that has a gradient, and not one zero."""
    model, masks = compressor.model, take_masks(compressor.targets)
    before = {target.name: target.weight.detach().clone() for target in compressor.targets}
    rows = [
        {name: value[index] for name, value in batch.items()}
        for batch in data
        for index in range(len(batch["pixel_values"]))
    ]
    make_trainer(folder, model, data=rows, max_steps=1, save_strategy="no", learning_rate=1e-3).train()
    after = take_masks(find_targets(model, include=compressor.config.include))
    assert all(torch.equal(mask, after[name]) for name, mask in masks.items())
    assert any(not torch.equal(target.weight, before[target.name]) for target in compressor.targets)


def assert_runs_sparse(model, batch):
    """With sparse layers it computes the same, where it has Linear layers with zeros."""
    linears = [
        target.name for target in find_targets(model) if type(target.module) is nn.Linear and (target.weight == 0).any()
    ]
    if not linears:
        return
    sparse = optimize_for_inference(copy.deepcopy(model), "csr")
    modules = dict(sparse.named_modules())
    assert not any(type(modules[name]) is nn.Linear for name in linears)
    assert_same_outputs(model, sparse, batch)
