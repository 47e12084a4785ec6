"""What runs between the layers of a model, in the layers: GELU at the end of a sparse one, an MLP as a whole."""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from transformers.activations import GELUActivation

from cap_hf.errors import CAPError
from cap_hf.inference.int8_linear import SparseInt8Linear
from cap_hf.inference.linear import SparseWeightLinear, carry_hooks
from cap_hf.models import uncompiled
from cap_hf.towers import see

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
        example: what the model is called with: twice, or more often where some are to be left.
    """
    modules = in_one_place(model)
    linears = {
        name: module
        for name in names
        if isinstance(module := modules.get(name), nn.Linear) and not module._forward_hooks
    }
    gelus = {name: module for name, module in modules.items() if is_gelu(module)}
    found, before = find_takers(model, linears, gelus, example)
    new: dict[str, dict[str, nn.Module]] = {gelu: {gelu: nn.Identity().eval()} for gelu in found.values()}
    for source, gelu in found.items():
        new[gelu][source] = GELULinear(linears[source])
    kept = keep_same(model, new, example, before)
    return {source: gelu for source, gelu in found.items() if gelu in kept}


def find_mlps(model: nn.Module, gelus: Mapping[str, str], names: Iterable[str], example: Example) -> dict[str, str]:
    """Return the Linear that takes all that a Linear gives after its GELU, and nothing else, by the names of both.

    It is tried as in `find_gelus`.

    Args:
        model: in eval mode, before any layer is replaced.
        gelus: what `find_gelus` returned of it.
        names: of the Linear layers in question.
        example: what the model is called with: twice, or more often where some are to be left.
    """
    modules = in_one_place(model)
    used = Counter(gelus.values())
    firsts = {gelu: first for first, gelu in gelus.items() if used[gelu] == 1}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    # By the size of what it gets a layer knows whether its work is done; one that ends with a GELU itself is no second.
    seconds = {
        name: linears[name]
        for name in names
        if name in linears and name not in gelus and linears[name].in_features != linears[name].out_features
    }
    found, before = find_takers(model, {gelu: modules[gelu] for gelu in firsts}, seconds, example)
    mlps = {firsts[gelu]: second for gelu, second in found.items()}
    new: dict[str, dict[str, nn.Module]] = {second: {second: nn.Identity().eval()} for second in mlps.values()}
    for first, second in mlps.items():
        new[second][first] = nn.Sequential(GELULinear(linears[first]), linears[second]).eval()
        new[second][gelus[first]] = nn.Identity().eval()
    kept = keep_same(model, new, example, before)
    return {first: second for first, second in mlps.items() if second in kept}


def in_one_place(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have one name; another one would have to be replaced in all of its places."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {name: module for name, module in model.named_modules() if places[id(module)] == 1}


def find_takers(
    model: nn.Module, sources: Mapping[str, nn.Module], takers: Mapping[str, nn.Module], example: Example
) -> tuple[dict[str, str], list[torch.Tensor]]:
    """Return by source the module that gets all its outputs as they are, and no input but sources' outputs.

    Between a source and its taker the output is not changed in place, and no hook is called, nor those of the taker.

    Args:
        model: that is called once, if there is anything to find.
        sources: modules by name.
        takers: modules by name, of which a source may be one.
        example: what the model is called with.

    Returns:
        The names of takers by those of sources, and all tensors that the model returned.
    """
    if not sources or not takers or torch.nn.modules.module._has_any_global_hook():
        return {}, []
    calls: Counter[str] = Counter()
    inputs: dict[str, list[str | None]] = {}
    # The source that was left last, its output, and how often that had been written to.
    latest: tuple[str | None, Any, int] = (None, None, 0)

    def left(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal latest
        calls[name] += 1
        # A model may enter inference mode itself, where tensors do not know how often they are written to.
        latest = (None, None, 0) if output.is_inference() else (name, output, output._version)

    def entered(name: str, module: nn.Module, args: tuple) -> None:
        same = args and args[0] is latest[1] and args[0]._version == latest[2]
        inputs.setdefault(name, []).append(latest[0] if same else None)

    def seen(*_: Any) -> None:
        nonlocal latest
        latest = (None, None, 0)

    modules = list(model.modules())
    watched = [module for module in modules if module._forward_hooks]
    # A hook that is called after a module sees what went into it.
    entries = [module for module in modules if module._forward_hooks or module._forward_pre_hooks]
    with ExitStack() as hooks:
        for module in entries:
            hooks.callback(module.register_forward_pre_hook(seen).remove)
        for module in watched:
            hooks.callback(module.register_forward_hook(seen).remove)
        for name, source in sources.items():
            hooks.callback(source.register_forward_hook(functools.partial(left, name)).remove)
        for name, taker in takers.items():
            hooks.callback(taker.register_forward_pre_hook(functools.partial(entered, name)).remove)
        outputs = run(model, example)
    found: dict[str, str] = {}
    for name, froms in inputs.items():
        if None not in froms and all(froms.count(source) == calls[source] for source in set(froms) if source):
            found |= {source: name for source in froms if source}
    return found, outputs


def keep_same(
    model: nn.Module, new: Mapping[str, Mapping[str, nn.Module]], example: Example, expected: list[torch.Tensor]
) -> set[str]:
    """Return which groups of new modules, in the place of others, leave what a model returns as it is, to the bit.

    Args:
        model: that stays as it is.
        new: of each group the modules by the names of those whose places they take; each place in one group.
        example: what the model is called with: once if all groups can be kept, else once more for each.
        expected: all tensors that the model returns.
    """
    if not new or returns_same(model, new, new, example, expected):
        return set(new)
    alone = {group for group in new if len(new) > 1 and returns_same(model, new, [group], example, expected)}
    return alone if alone and returns_same(model, new, alone, example, expected) else set()


def returns_same(
    model: nn.Module,
    new: Mapping[str, Mapping[str, nn.Module]],
    groups: Iterable[str],
    example: Example,
    expected: list[torch.Tensor],
) -> bool:
    """Return whether a model returns the same bits with the new modules of some groups; see `keep_same`."""
    with ExitStack() as stack:
        for group in groups:
            for name, module in new[group].items():
                stack.enter_context(replaced(model, name, module))
        try:
            found = run(model, example)
        except CAPError:  # the model asks its layers for what these do not have, as for the dtype of their weight
            return False
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


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


def fuse_mlps(model: nn.Module, mlps: Mapping[str, str]) -> None:
    """Let a sparse int8 layer that ends with GELU do the work of the sparse int8 layer behind it as well.

    Args:
        model: with sparse layers, after `fuse_gelus`.
        mlps: what `find_mlps` returned of it before.
    """
    for first, second in mlps.items():
        layer, behind = model.get_submodule(first), model.get_submodule(second)
        if isinstance(layer, SparseInt8Linear) and isinstance(behind, SparseInt8Linear):
            layer.next, behind.is_done = (behind,), True


def run(model: nn.Module, example: Example) -> list[torch.Tensor]:
    """Return all tensors that a model returns, without torch.compile."""
    # Not in inference mode, where a tensor does not know how often it has been written to.
    with uncompiled(model), torch.inference_mode(False), torch.no_grad():
        return [leaf for leaf in tree_leaves(see(model, example)) if isinstance(leaf, torch.Tensor)]
