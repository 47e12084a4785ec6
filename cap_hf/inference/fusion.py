"""What runs between the layers of a model: GELU at the end of a sparse layer, attention in int8."""

import copy
import functools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.activations import GELUActivation

from cap_hf.inference import attention
from cap_hf.inference.choice import MARGIN, RUNS, SECONDS, time_in_turns
from cap_hf.inference.linear import SparseWeightLinear, carry_hooks
from cap_hf.models import uncompiled
from cap_hf.towers import see, tower_of

Example = Mapping[str, torch.Tensor]


class GELULinear(nn.Module):
    """A Linear that ends with GELU: what a sparse layer will be, in the dense model's own numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.eval()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.gelu(functional.linear(input, self.linear.weight, self.linear.bias))


def is_gelu(module: nn.Module) -> bool:
    """Return whether a module is the GELU by the error function, and nothing else."""
    if type(module) is nn.GELU:
        return module.approximate == "none"
    return type(module) is GELUActivation and module.act is functional.gelu


def find_gelus(model: nn.Module, names: Iterable[str], example: Example) -> dict[str, str]:
    """Return the GELU module that takes all outputs of a Linear, and no others, by the names of both.

    That nothing else takes these outputs is tried: with the GELU in the Linear and nothing in its own place, the model
    returns the same bits. Layers with hooks that would see other numbers are left out.

    Args:
        model: in eval mode, before any layer is replaced.
        names: of the Linear layers in question.
        example: what the model is called with, twice.
    """
    # A module with several names would have to be replaced in all of its places.
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    modules = {name: model.get_submodule(name) for name in names}
    linears = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and places[id(module)] == 1 and not module._forward_hooks
    }
    gelus = {
        name: module
        for name, module in model.named_modules()
        if is_gelu(module) and places[id(module)] == 1 and not module._forward_pre_hooks
    }
    if not linears or not gelus:
        return {}
    calls: Counter[str] = Counter()
    sources: dict[str, list[str | None]] = {}
    latest: tuple[str | None, Any] = (None, None)

    def left(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal latest
        calls[name] += 1
        latest = (name, output)

    def entered(name: str, module: nn.Module, args: tuple) -> None:
        sources.setdefault(name, []).append(latest[0] if args and args[0] is latest[1] else None)

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
    with ExitStack() as stack:
        for source, follower in found.items():
            stack.enter_context(replaced(model, source, GELULinear(linears[source])))
            stack.enter_context(replaced(model, follower, nn.Identity().eval()))
        after = run(model, example)
    same = len(before) == len(after) and all(map(torch.equal, before, after))
    return found if same else {}


@contextmanager
def replaced(model: nn.Module, name: str, new: nn.Module) -> Any:
    """Put a module in the place of another for a while, with its hooks."""
    old = model.get_submodule(name)
    carry_hooks(old, new)
    model.set_submodule(name, new)
    try:
        yield
    finally:
        model.set_submodule(name, old)


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
    """Compute the attention of what sees images in int8, if the model is measured to be faster with it on an example.

    The config that says so is then the model's own: others may have been made of the one it had.
    """
    tower = tower_of(model)
    configs = attention.configs_of(tower)
    if not configs:
        return

    def call(name: str) -> None:
        for config in configs:
            attention.choose(config, name)
        with uncompiled(model), torch.inference_mode():
            see(model, example)

    try:
        with Seen() as seen:
            call(attention.NAME)
        if not seen.int8_attention:
            return
        names = ("sdpa", attention.NAME)
        times = time_in_turns([functools.partial(call, name) for name in names], RUNS, SECONDS)
    finally:
        for config in configs:
            attention.choose(config, "sdpa")
    before, after = (statistics.median(each) for each in times)
    if after >= MARGIN * before:
        return
    own: dict[int, PreTrainedConfig] = {}
    for module in tower.modules():
        held = getattr(module, "config", None)
        if isinstance(held, PreTrainedConfig):
            setattr(module, "config", own.setdefault(id(held), copy.copy(held)))  # noqa: B010
    for each in configs:
        attention.choose(own[id(each)], attention.NAME)


class Seen(TorchDispatchMode):
    """Sees whether attention runs in int8 while it is entered: masks and the like may prevent it."""

    int8_attention = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.int8_attention |= func is torch.ops.cap_hf.int8_attention.default
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, example: Example) -> list[torch.Tensor]:
    """Return all tensors that a model returns, without torch.compile."""
    with uncompiled(model), torch.inference_mode():
        return [leaf for leaf in tree_leaves(see(model, example)) if isinstance(leaf, torch.Tensor)]
