"""A model is looked at before it is used: what wraps it is taken off, what would come out wrong is refused."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers import PreTrainedModel

from cap_hf.errors import CAPError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Wrappers whose parameters are shares of the model's.
SPLIT = ("FullyShardedDataParallel", "DeepSpeedEngine")
# Wrappers that share batches out among whole copies.
SHARING = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# Layers whose weights and biases are parameters, finite and in the checkpoint.
LAYERS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
# Where the functions are written that put a `forward` under autocast: those of `accelerator.prepare`, and of PyTorch.
AUTOCAST = ("accelerate.utils.operations", "torch.amp.autocast_mode")


def usable(model: Any) -> Any:
    """Return a model without what wraps it, once everything in it is what it seems to be.

    Taken off are `torch.compile`, DataParallel and DistributedDataParallel: what was given goes on computing with the
    same weights. A model that was compiled in place stays so, see `uncompiled`. Weights that are shared, in half
    precision or frozen are left to those who work on them.

    Args:
        model: a module, of transformers or not.

    Raises:
        CAPError: it is no module, a part of it is wrapped, it has adapters, is spread over devices, quantised or
            optimised for inference, a weight is made anew before every forward pass, or one is not finite.
    """
    if not isinstance(model, nn.Module):
        raise CAPError(
            f"{model!r:.80} is no model but of type {type(model).__name__}: load one first, such as "
            "AutoModelForImageClassification.from_pretrained(...)"
        )
    model = bare(model)
    for check in (check_adapters, check_parts, check_placement, check_quantized, check_remade, check_finite):
        check(model)
    return model


def usable_of_transformers(model: Any) -> PreTrainedModel:
    """Return what `usable` does, of transformers' models alone: what needs a config and `save_pretrained`.

    Raises:
        CAPError: as `usable`, or it is a module of another kind.
    """
    model = usable(model)
    if not isinstance(model, PreTrainedModel):
        raise CAPError(
            f"{type(model).__name__} is no model of transformers: load it with "
            "AutoModelForImageClassification.from_pretrained(...), which has timm's models too"
        )
    return model


def bare(model: nn.Module) -> nn.Module:
    """Return a model without what compiles it, and shares its batches out, as a whole.

    Raises:
        CAPError: what wraps it has split its weights.
    """
    while True:
        if type(model).__name__ in SPLIT:
            raise CAPError(f"{type(model).__name__} splits the weights, and whole ones are needed: use DDP")
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        if inner is model:
            return model
        model = inner


def check_adapters(model: nn.Module) -> None:
    """Raise a CAPError if a model has adapters of PEFT, whose weights are no layers of their own."""
    if hasattr(model, "get_base_model") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise CAPError(
            f"{type(model).__name__} has adapters (PEFT): merge them into its weights first, with merge_and_unload()"
        )


def check_parts(model: nn.Module) -> None:
    """Raise a CAPError if a part of a model is wrapped, by which its weights have other names, or holds none."""
    for name, module in model.named_modules():
        if type(module).__name__ in SPLIT:
            raise CAPError(f"{name} is in {type(module).__name__}, which splits its weights: use DDP")
        within = "_orig_mod" if is_compiled_module(module) else "module" if isinstance(module, SHARING) else None
        if within is not None:
            raise CAPError(
                f"{name} is wrapped in {type(module).__name__} inside the model, whose weights then have other names: "
                f"take it off, model.{name} = model.{name}.{within}, and wrap the whole model"
            )
        if getattr(module, "inference_only", False):
            part = f"its layer {name}" if name else type(model).__name__
            raise CAPError(f"the model was optimised for inference, and so was {part}: load it anew")


def check_placement(model: nn.Module) -> None:
    """Raise a CAPError if a `device_map` has spread a model over devices, or a part of it holds no numbers."""
    places = sorted({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(places) > 1:
        raise CAPError(
            f"device_map has put parts of the model on {', '.join(places)}: load it without device_map; several GPUs "
            "share the work under accelerate launch"
        )
    lazy = next((name for name, each in model.named_parameters() if nn.parameter.is_lazy(each)), None)
    if lazy is not None:
        raise CAPError(f"{lazy} has no size yet, since its layer is lazy: call the model on a batch first")
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise CAPError(f"{empty} is on the device meta, which holds no numbers: load the model with from_pretrained")


def is_plain(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is held as plain numbers: of a class of its own they have to be floating-point ones.

    What libraries of quantization hold is another kind of tensor, or a kind of parameter with codes in it.
    """
    own = type(parameter)
    return own in (nn.Parameter, torch.Tensor) or (nn.Parameter in own.__mro__ and parameter.dtype in FLOATS)


def check_quantized(model: nn.Module) -> None:
    """Raise a CAPError if weights of a model are held as something else than plain floating-point numbers."""
    kind = None
    for name, parameter in model.named_parameters():
        held = type(parameter).__name__
        if held == "DTensor":
            raise CAPError(f"{name} is spread over processes (DTensor), and whole weights are needed: use DDP")
        if held.startswith("SparseSemiStructured"):
            raise CAPError(f"the model was optimised for inference, and so was {name}: load it anew")
        if not is_plain(parameter):
            kind = kind or held
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, (nn.Linear, nn.Conv2d)) and weight is not None and weight.dtype not in FLOATS:
            kind = kind or str(weight.dtype)
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            kind = kind or type(module).__module__
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None)
        kind = str(getattr(method, "value", method) or kind)
    if kind is not None:
        raise CAPError(
            f"the weights of {type(model).__name__} are quantised ({kind}): load the checkpoint in floating point that "
            "they were made from, and quantise what comes out"
        )


def check_remade(model: nn.Module) -> None:
    """Raise a CAPError if a layer makes a weight anew before every forward pass: what is written into it is lost."""
    found = list(remade(model))
    if found:
        name, what, call = found[0]
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise CAPError(
            f"{name}{others} is made anew before every forward pass by {what}, so that what is written into it is "
            f"lost: call {call} on the module first"
        )


def remade(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield each tensor that a module makes anew before every forward pass: its name, what makes it, what ends that."""
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():
                ends = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
                yield f"{dot}{name}", f"a parametrization ({type(chain[0]).__name__.lstrip('_')})", ends
        known = set()
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                name, call = hook._tensor_name, f"prune.remove(module, {hook._tensor_name!r})"
            elif isinstance(hook, WeightNorm):
                name, call = hook.name, f"remove_weight_norm(module, {hook.name!r})"
            elif isinstance(hook, SpectralNorm):
                name, call = hook.name, f"remove_spectral_norm(module, {hook.name!r})"
            else:
                continue
            known.add(name)
            yield f"{dot}{name}", f"a hook ({type(hook).__name__})", f"torch.nn.utils.{call}"
        for name in ("weight", "bias"):
            plain = module.__dict__.get(name)
            # On another module it may be a constant, which no checkpoint was ever to have.
            lost = isinstance(plain, torch.Tensor) and (isinstance(module, LAYERS) or plain.requires_grad)
            if lost and name not in known:
                end = f"{name} = module.{name}.detach(); del module.{name}; module.{name} = torch.nn.Parameter({name})"
                yield f"{dot}{name}", "code that sets it as a plain tensor", end


def check_finite(model: nn.Module) -> None:
    """Raise a CAPError if a weight of a model is not a number, or one of a layer is infinite, as a mask may be.

    What is quantised is not looked at.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if not is_plain(parameter) or parameter.dtype not in FLOATS or parameter.is_meta:
                continue
            values = parameter.detach()
            if values.isnan().any() or (isinstance(module, LAYERS) and values.isinf().any()):
                raise CAPError(
                    f"{name} has entries that are NaN or infinite, in {parameter.dtype}: load a checkpoint whose "
                    "weights are finite (float16 ends at 65504: convert from the float32 checkpoint)"
                )


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a model that was compiled in place, `model.compile()`, runs as it was written.

    What is compiled passes over hooks that came later, without a word.
    """
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Inside the context a model computes in its own dtype, without autocast around it or on its `forward`.

    accelerate has `unwrap_model(model, keep_fp32_wrapper=False)` for this, which does not serve here: it cannot put
    the autocast back for the training that goes on, and of a transformers model it takes transformers' own decorators
    of `forward` away as well. However often a model was prepared, what was its `forward` before is called.
    """
    forward, own = model.forward, "forward" in model.__dict__
    plain = without_autocast(forward)
    with ExitStack() as stack:
        for kind in {"cpu", "cuda", *(parameter.device.type for parameter in model.parameters())}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if plain is not forward:
            stack.callback(setattr, model, "forward", forward) if own else stack.callback(delattr, model, "forward")
            model.forward = plain
        yield


def without_autocast(forward: Callable) -> Callable:
    """Return a function without the decorators around it that compute in half precision; itself if there are none."""
    function: Any = forward.__func__ if isinstance(forward, MethodType) else forward
    inner = function
    while hasattr(inner, "__wrapped__") and written_in(inner) in AUTOCAST:
        inner = inner.__wrapped__
    if inner is function:
        return forward
    return MethodType(inner, forward.__self__) if isinstance(forward, MethodType) else inner


def written_in(function: Any) -> str:
    """Return the module that a function is written in, which a decorator's own name says nothing of."""
    return function.__globals__["__name__"] if isinstance(function, FunctionType) else type(function).__module__
