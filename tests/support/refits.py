"""The refit of a layer as least squares with rows for the ridge, row by row, by NumPy."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def by_hand(weight, bias, inputs, outputs, ridge):
    """Return the refitted weight and bias of a layer in float64, each row alone.

    It solves `[X 1; sqrt(n r) I 0] [w; b] = [y; sqrt(n r) w0]`.

    Args:
        weight: as pruned.
        bias: None for none.
        inputs: gives the inputs `(n, row)` of a row's number.
        outputs: that are wanted.
        ridge: relative to the mean second moment of the inputs, about their mean where there is a bias.
    """
    rows = outputs.transpose(0, 1).flatten(1) if weight.dim() == 4 else outputs.flatten(0, -2).T
    found, offsets = np.zeros((len(weight), weight[0].numel())), np.zeros(len(weight))
    for row, wanted in enumerate(rows.numpy()):
        x = inputs(row).numpy()
        centred = x - x.mean(0) if bias is not None else x
        strength = ridge * centred.var(0).mean() if bias is not None else ridge * np.square(x).mean()
        old = weight[row].flatten().numpy()
        kept = old != 0
        ones = np.ones((len(x), 1)) if bias is not None else np.zeros((len(x), 0))
        held = np.sqrt(len(x) * strength) * np.eye(kept.sum())
        system = np.block([[x[:, kept], ones], [held, np.zeros((kept.sum(), ones.shape[1]))]])
        solved = np.linalg.lstsq(system, np.concatenate([wanted, held @ old[kept]]), rcond=None)[0]
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
