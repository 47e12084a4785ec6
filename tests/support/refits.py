"""A layer's refit as least squares with rows for the ridge, by NumPy; the weights of its positions by autograd."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def by_hand(weight, bias, inputs, outputs, ridge, weights):
    """Return the refitted weight and bias of a layer in float64, each row alone.

    It solves `[V X V1; sqrt(sum(v) r) I 0] [w; b] = [V y; sqrt(sum(v) r) w0]`, V with the square roots of v.

    Args:
        weight: as pruned.
        bias: None for none.
        inputs: gives the inputs `(n, row)` of a row's number.
        outputs: that are wanted.
        ridge: relative to the mean second moment of the inputs, about their mean where there is a bias.
        weights: v, of the n positions in any shape.
    """
    rows = outputs.transpose(0, 1).flatten(1) if weight.dim() == 4 else outputs.flatten(0, -2).T
    found, offsets = np.zeros((len(weight), weight[0].numel())), np.zeros(len(weight))
    v = weights.flatten().numpy()
    roots = np.sqrt(v)[:, None]
    for row, wanted in enumerate(rows.numpy()):
        x = inputs(row).numpy()
        mean = np.average(x, 0, v) if bias is not None else 0
        strength = ridge * np.average(np.square(x - mean), 0, v).mean()
        old = weight[row].flatten().numpy()
        kept = old != 0
        ones = np.ones((len(x), 1)) if bias is not None else np.zeros((len(x), 0))
        held = np.sqrt(v.sum() * strength) * np.eye(kept.sum())
        system = np.block([[roots * x[:, kept], roots * ones], [held, np.zeros((kept.sum(), ones.shape[1]))]])
        solved = np.linalg.lstsq(system, np.concatenate([roots[:, 0] * wanted, held @ old[kept]]), rcond=None)[0]
        found[row, kept] = solved[: kept.sum()]
        offsets[row] = solved[-1] if bias is not None else 0
    return torch.from_numpy(found).view_as(weight), torch.from_numpy(offsets)


def patches(module, pixels):
    """Return what gives the inputs `(n, row)` of a row of a layer."""
    if isinstance(module, nn.Linear):
        return lambda row: pixels.flatten(0, -2)
    group = len(module.weight) // module.groups
    columns = F.unfold(pixels, module.kernel_size, padding=module.padding, stride=module.stride)
    by_group = columns.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return lambda row: by_group[row // group]


def weights_by_hand(model, name, inputs, loss):
    """Return the weights of the positions of a layer's output, `(b, positions)`, one example after the other.

    Args:
        model: whose parameters need gradients.
        name: of a Linear or a Conv2d.
        inputs: of b examples.
        loss: takes what the model makes of one, and which it is.
    """
    module, found = model.get_submodule(name), []
    for index in range(len(inputs["pixel_values"])):
        kept = []
        handle = module.register_forward_hook(lambda _, args, output, kept=kept: kept.append(output))
        value = loss(model(**{key: each[index : index + 1] for key, each in inputs.items()}), index)
        handle.remove()
        (grads,) = torch.autograd.grad(value, kept, allow_unused=True)
        grads = torch.zeros_like(kept[0]) if grads is None else grads
        squares = grads.double().pow(2).sum(1 if isinstance(module, nn.Conv2d) else -1).flatten().tolist()
        mean = sum(squares) / len(squares)
        found.append([0.1 + 0.9 * (min(20, each / mean) if mean else 1) for each in squares])
    return torch.tensor(found, dtype=torch.float64)


def sampled_loss(places, seed=42):
    """Return the cross entropy of an example with a label drawn from the model, by its place and a seed."""
    uniforms = torch.rand(max(places) + 1, generator=torch.Generator().manual_seed(seed)).double()

    def loss(outputs, index):
        cumulative = outputs.logits[0].detach().softmax(0).cumsum(0)
        label = (cumulative < uniforms[places[index]]).sum()
        # In float32, as the package has it: its rounding is not what is looked at.
        return F.cross_entropy(outputs.logits.float(), label[None])

    return loss
