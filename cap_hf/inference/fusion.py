"""What runs between the layers of a model: GELU at the end of a sparse layer, attention in int8."""

import functools
import statistics
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import GELUActivation

from cap_hf.errors import CAPError
from cap_hf.inference import attention
from cap_hf.inference.choice import MARGIN, RUNS, SECONDS, time_in_turns
from cap_hf.inference.linear import SparseWeightLinear, carry_hooks
from cap_hf.models import uncompiled
from cap_hf.outputs import main_output
from cap_hf.towers import see

Example = Mapping[str, torch.Tensor]


def is_gelu(module: nn.Module) -> bool:
    """Return whether a module is the GELU by the error function, and nothing else."""
    if type(module) is nn.GELU:
        return module.approximate == "none"
    return type(module) is GELUActivation and module.act is functional.gelu


def find_gelus(model: nn.Module, names: Iterable[str], example: Example) -> dict[str, str]:
    """Return the GELU module that takes all outputs of a Linear, and no others, by the names of both.

    That nothing else takes these outputs is tried: with GELU inside the Linear the model gives the same bits.

    Args:
        model: in eval mode, before any layer is replaced; it can be called with the example.
        names: of the Linear layers in question.
        example: what the model is called with, twice.
    """
    try:
        return _find_gelus(model, names, example)
    except CAPError:  # its outputs are not known, so that they cannot be compared
        return {}


def _find_gelus(model: nn.Module, names: Iterable[str], example: Example) -> dict[str, str]:
    linears = {name: model.get_submodule(name) for name in names}
    gelus = {name: module for name, module in model.named_modules() if is_gelu(module)}
    calls: dict[str, int] = {}
    sources: dict[str, list[str | None]] = {}
    latest: tuple[str | None, Any] = (None, None)

    def left(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal latest
        calls[name] = calls.get(name, 0) + 1
        latest = (name, output)

    def entered(name: str, module: nn.Module, args: tuple) -> None:
        sources.setdefault(name, []).append(latest[0] if args[0] is latest[1] else None)

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_hook(functools.partial(left, name)).remove)
        for name, gelu in gelus.items():
            hooks.callback(gelu.register_forward_pre_hook(functools.partial(entered, name)).remove)
        before = run(model, example)
    latest = (None, None)
    found: dict[str, str] = {}
    for name, froms in sources.items():
        if None not in froms and all(froms.count(linear) == calls[linear] for linear in set(froms) if linear):
            found |= {linear: name for linear in froms if linear}
    if not found:
        return {}
    with ExitStack() as hooks:
        for source, follower in found.items():
            hooks.callback(linears[source].register_forward_hook(lambda _, args, y: functional.gelu(y)).remove)
            hooks.callback(gelus[follower].register_forward_hook(lambda _, args, y: args[0]).remove)
        after = run(model, example)
    return found if torch.equal(before, after) else {}


def fuse_gelus(model: nn.Module, gelus: Mapping[str, str]) -> None:
    """Let sparse layers end with the GELU that follows them, where all layers that a GELU follows are sparse.

    Args:
        model: with sparse layers.
        gelus: what `find_gelus` returned of it before.
    """
    for gelu in set(gelus.values()):
        followed = [model.get_submodule(linear) for linear, follower in gelus.items() if follower == gelu]
        layers = [layer for layer in followed if isinstance(layer, SparseWeightLinear) and layer.has_gelu]
        if len(layers) < len(followed):
            continue
        for layer in layers:
            layer.gelu = True
        identity = nn.Identity().eval()
        carry_hooks(model.get_submodule(gelu), identity)
        model.set_submodule(gelu, identity)


def speed_up_attention(model: nn.Module, example: Example) -> None:
    """Compute attention in int8 if the model is measured to be faster with it, on an example."""
    configs = attention.configs_of(model)
    if not configs:
        return

    def call(name: str) -> None:
        for config in configs:
            config._attn_implementation = name
        with uncompiled(model), torch.inference_mode():
            see(model, example)

    names = ("sdpa", attention.NAME)
    times = time_in_turns([functools.partial(call, name) for name in names], RUNS, SECONDS)
    before, after = (statistics.median(each) for each in times)
    for config in configs:
        config._attn_implementation = attention.NAME if after < MARGIN * before else "sdpa"


def run(model: nn.Module, example: Example) -> torch.Tensor:
    """Return what a model is called for, without torch.compile."""
    with uncompiled(model), torch.inference_mode():
        outputs = see(model, example)
    return outputs if isinstance(outputs, torch.Tensor) else main_output(outputs)[1]
