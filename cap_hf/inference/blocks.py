"""Blocks of a transformer that an optimised model computes in two calls, one for each residual branch."""

import functools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig
from transformers.utils import output_capturing

from cap_hf.inference.attention import MOST_KEYS, NAME
from cap_hf.inference.branches import Norm, sparse_int8_attention_branch, sparse_int8_mlp_branch
from cap_hf.inference.int8_linear import SparseInt8Linear
from cap_hf.inference.operators import int8_attention
from cap_hf.models import uncompiled
from cap_hf.towers import see


@dataclass
class Block:
    """The modules of a block with LayerNorm first: x + scale(attention(norm(x))), then the same with its MLP.

    Attributes:
        norms: before attention and before the MLP.
        query, key, value, output: of attention.
        first: of the MLP; it does the work of the second layer too, see `SparseInt8Linear`.
        scales: modules that multiply what comes out of attention and of the MLP by their only parameter (LayerScale).
        heads, scale: of attention.
        attention: the module whose config says how attention is computed.
        scaling: what that module had as its attribute of this name.
        places: all modules of the block: a dict of modules that one is in, its name there, itself, and its class.
    """

    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    query: SparseInt8Linear
    key: SparseInt8Linear
    value: SparseInt8Linear
    output: SparseInt8Linear
    first: SparseInt8Linear
    scales: tuple[nn.Module | None, nn.Module | None]
    heads: int
    scale: float
    attention: Any
    scaling: Any
    places: list[tuple[dict[str, nn.Module | None], str, nn.Module, type]] = field(repr=False)

    def module_by_module(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the block makes of x `(images, tokens, cols)` as its modules compute it."""
        images, tokens, _ = x.shape
        normal = self.norms[0](x)
        q, k, v = (
            layer(normal).view(images, tokens, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = self.output(int8_attention(q, k, v, self.scale).reshape(images, tokens, -1))
        x = x + (y if self.scales[0] is None else y * next(self.scales[0].parameters()))
        y = self.first(self.norms[1](x))
        return x + (y if self.scales[1] is None else y * next(self.scales[1].parameters()))

    def at_once(self, x: torch.Tensor) -> torch.Tensor:
        """Return the same, branch by branch."""
        # Parameters by their dicts: modules take long to look them up.
        own: list[Any] = [None if each is None else each._parameters for each in (*self.norms, *self.scales)]
        first, second = (
            Norm(each["weight"], each["bias"], norm.eps) for each, norm in zip(own, self.norms, strict=False)
        )
        factors = [None if each is None else next(iter(each.values())) for each in own[2:]]
        query, key, value, output, inner, outer = (
            (layer.packed_weight(), layer.bias)
            for layer in (self.query, self.key, self.value, self.output, self.first, *self.first.next)
        )
        x = sparse_int8_attention_branch(x, first, query, key, value, self.heads, self.scale, output, factors[0])
        return sparse_int8_mlp_branch(x, second, inner, outer, factors[1])

    def is_whole(self) -> bool:
        """Return whether every module is what and where it was, and none has hooks, which would see nothing."""
        return (
            not torch.nn.modules.module._has_any_global_hook()
            and getattr(self.attention, "scaling", None) == self.scaling
            and not getattr(self.attention, "is_causal", False)
            and all(is_normal(norm) for norm in self.norms)
            and all(
                parent.get(name) is module
                and type(module) is kind
                and not module.training
                and not module._forward_pre_hooks
                and (not module._forward_hooks or sees_nothing(module._forward_hooks.values()))
                and "forward" not in module.__dict__
                for parent, name, module, kind in self.places
            )
        )


def is_normal(norm: nn.LayerNorm) -> bool:
    """Return whether a LayerNorm has both of its parameters, in float32 on the CPU, where the operators read them."""
    own = (norm._parameters.get("weight"), norm._parameters.get("bias"))
    return all(each is not None and each.dtype == torch.float32 and each.is_cpu for each in own)


def sees_nothing(hooks: Iterable[Any]) -> bool:
    """Return whether hooks are those of transformers for outputs that nobody asks for now.

    It puts them on modules when `output_attentions` or `output_hidden_states` is first asked for; there they stay.
    """
    if torch.compiler.is_compiling():
        return False
    collected = output_capturing._active_collector.get() or {}
    for hook in hooks:
        if getattr(hook, "__module__", "") != output_capturing.__name__:
            return False
        key = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True)).get("key")
        if key is None or key.cell_contents in collected:
            return False
    return True


def forward(module: nn.Module, block: Block, /, *args: Any, **kwargs: Any) -> Any:
    """Return what a module that is a block returns: at once where nothing is asked that only its modules can do."""
    x: Any = args[0] if args else None
    # Hidden states are what blocks return: to collect them is not their own work.
    rest = [each for name, each in kwargs.items() if name != "output_hidden_states"]
    plain = (
        isinstance(x, torch.Tensor)
        and not module.training
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() == 3
        and x.shape[1] <= MOST_KEYS
        and x.is_contiguous()
        and not any(each is not None and each is not False for each in (*args[1:], *rest))
        and (torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None)
        and block.attention.config._attn_implementation == NAME
        and block.is_whole()
    )
    return block.at_once(x) if plain else type(module).forward(module, *args, **kwargs)


def fuse_blocks(model: nn.Module, example: Mapping[str, torch.Tensor]) -> None:
    """Let a model compute its blocks branch by branch.

    That a module is such a block is tried: its modules, called as the block calls them, give the bits that it gives.

    Args:
        model: with sparse int8 layers and attention in int8, after all else has been put into it.
        example: what the model is called with, once.
    """
    for module, block in find_blocks(model, example).items():
        vars(module)["forward"] = functools.partial(forward, module, block)


@dataclass
class Call:
    """One call of a module without children, or of attention: what was called, what went in, and what came out.

    Attributes:
        what: the module, or the number that attention multiplies its scores by.
    """

    what: Any
    inputs: list[torch.Tensor]
    output: Any


class Calls(TorchDispatchMode):
    """Keeps the calls of attention in int8 while it is entered."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.cap_hf.int8_attention.default:
            self.calls.append(Call(args[3], list(args[:3]), output))
        return output


def find_blocks(model: nn.Module, example: Mapping[str, torch.Tensor]) -> dict[nn.Module, Block]:
    """Return the modules that are blocks; see `fuse_blocks`."""
    calls: list[Call] = []
    begins: dict[nn.Module, list[int]] = {}
    spans: dict[nn.Module, tuple[Call, list[Call]]] = {}

    def begin(module: nn.Module, args: tuple) -> None:
        begins.setdefault(module, []).append(len(calls))

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        inside = calls[begins[module].pop() :]
        call = Call(module, [each for each in args if isinstance(each, torch.Tensor)], output)
        if any(True for _ in module.children()):
            spans[module] = call, inside
        else:
            calls.append(call)

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end).remove)
        stack.enter_context(uncompiled(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(Calls(calls))
        see(model, example)
    blocks: dict[nn.Module, Block] = {}
    for module, (call, inside) in spans.items():
        if "forward" in vars(module) or any(other in blocks for other in module.modules()):
            continue
        block = block_of(module, inside)
        inputs = call.inputs
        if block is not None and len(inputs) == 1 and inputs[0].dim() == 3 and isinstance(call.output, torch.Tensor):
            with torch.no_grad():
                if torch.equal(block.module_by_module(call.inputs[0]), call.output):
                    blocks[module] = block
    return blocks


def block_of(module: nn.Module, calls: list[Call]) -> Block | None:
    """Return the block that a module may be by the calls in it, in their order, or None."""
    # What hands on what it gets: dropout, and the second layer of an MLP.
    rest = [call for call in calls if not (call.inputs and call.output is call.inputs[0])]
    if not all(isinstance(call.output, torch.Tensor) for call in rest):
        return None
    pattern = "".join(letter(call) for call in rest)
    if pattern not in ("NLLLALNL", "NLLLALSNLS"):
        return None
    norm, *heads, attention, output, next_norm, first = (call for call in rest if not is_scale(call.what))
    makers = {call.output.untyped_storage().data_ptr(): call.what for call in heads}
    query, key, value = (makers.get(each.untyped_storage().data_ptr()) for each in attention.inputs)
    configs = {each: getattr(each, "config", None) for each in module.modules()}
    holders = [each for each, config in configs.items() if isinstance(config, PreTrainedConfig)]
    if query is None or key is None or value is None or not holders or not first.what.next:
        return None
    scales = [call.what for call in rest if is_scale(call.what)] or [None, None]
    return Block(
        norms=(norm.what, next_norm.what),
        query=query,
        key=key,
        value=value,
        output=output.what,
        first=first.what,
        scales=(scales[0], scales[1]),
        heads=attention.inputs[0].shape[1],
        scale=attention.what,
        attention=holders[0],
        scaling=getattr(holders[0], "scaling", None),
        places=[
            (each._modules, name, child, type(child))
            for each in module.modules()
            for name, child in each.named_children()
        ],
    )


def letter(call: Call) -> str:
    """Return what a call is in a pattern: N LayerNorm, L a sparse int8 layer, A attention, S LayerScale, or ?."""
    what = call.what
    if isinstance(what, float):
        return "A"
    if type(what) is nn.LayerNorm:
        return "N" if is_normal(what) and len(what.normalized_shape) == 1 else "?"
    if type(what) is SparseInt8Linear:
        return "L"
    return "S" if is_scale(what) else "?"


def is_scale(what: Any) -> bool:
    """Return whether this may be LayerScale, a module with one vector; that it multiplies by it is tried."""
    if not isinstance(what, nn.Module) or isinstance(what, SparseInt8Linear):
        return False
    held = list(what.parameters())
    return len(held) == 1 and held[0].dim() == 1 and len(held[0]) > 1 and not any(True for _ in what.buffers())
