"""Hidden states that are kept between passes: each pass then goes through its own layers of the model alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from cap_hf.collection.running import Batch, backward
from cap_hf.collection.stretches import Call, Chain, Stretch, first_tensor
from cap_hf.method.losses import FisherLoss


@dataclass
class Microbatch:
    """What is kept of some gradient samples that went through the model together.

    Attributes:
        calls: what layers were called with, by chain and number; the hidden states only of those that stretches begin
            with.
        grads: gradients of the loss with respect to the hidden states behind the layers that stretches end with.
    """

    calls: dict[tuple[int, int], Call] = field(default_factory=dict)
    grads: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


# What is kept of a step: its microbatches, by the number of their first gradient sample.
KeptStep = dict[int, Microbatch]


class Through(Protocol):
    """Takes gradient samples of a step through a model, or a part of it, forward and backward."""

    def __call__(
        self, model: nn.Module, batch: Any, draws: torch.Tensor | None, samples: int, part: slice
    ) -> torch.Tensor:
        """Return the summed loss of some gradient samples, `()`; 0 where it is not computed again.

        Args:
            model: within `frozen`, with hooks on the layers whose gradients are wanted.
            batch: of the step.
            draws: what is random in the loss of each example of the step; None where nothing is.
            samples: gradient samples of the step.
            part: which of them.
        """


class WholeModel:
    """Takes examples through the whole model.

    Args:
        loss: whose gradients are wanted.
    """

    def __init__(self, loss: FisherLoss) -> None:
        self.loss = loss

    def __call__(
        self, model: nn.Module, batch: Batch, draws: torch.Tensor | None, samples: int, part: slice
    ) -> torch.Tensor:
        """Return the summed loss; arguments are those of `Through`, and `batch` has the examples."""
        group = len(batch["pixel_values"]) // samples
        examples = slice(part.start * group, part.stop * group)
        taken = {name: value[examples] for name, value in batch.items()}
        return backward(model, taken, self.loss, None if draws is None else draws[examples], group)


class Alone:
    """Takes what was kept of a step through the layers of one stretch alone.

    Args:
        stretch: whose targets' gradients are wanted.
    """

    def __init__(self, stretch: Stretch) -> None:
        self.stretch = stretch

    def __call__(
        self, model: nn.Module, batch: KeptStep, draws: torch.Tensor | None, samples: int, part: slice
    ) -> torch.Tensor:
        """Return 0: the loss was looked at when the states were kept. Arguments are those of `Through`."""
        kept, own = batch[part.start], id(self.stretch.chain)
        calls = {number: call for (chain, number), call in kept.calls.items() if chain == own}
        with torch.enable_grad():
            made = self.stretch.forward(calls)
        if made.requires_grad:
            made.backward(kept.grads[own, self.stretch.stop])
        return made.new_zeros(())


class KeptStates:
    """Takes examples through the whole model once, and keeps what some stretches need to be gone through alone.

    Args:
        stretches: by the number of the pass that they are for.
        loss: whose gradients are wanted.

    Attributes:
        stretches: as given.
        steps: for each step its number of gradient samples, and what is kept of it.
        is_whole: whether all steps of a pass are there.
    """

    def __init__(self, stretches: Mapping[int, Stretch], loss: FisherLoss) -> None:
        self.stretches, self.whole = dict(stretches), WholeModel(loss)
        self.steps: list[tuple[int, KeptStep]] = []
        self.is_whole = False
        self._current = Microbatch()

    def __call__(
        self, model: nn.Module, batch: Batch, draws: torch.Tensor | None, samples: int, part: slice
    ) -> torch.Tensor:
        """Return the summed loss, and keep; arguments are those of `Through`."""
        if part.start == 0:
            self.steps.append((samples, {}))
        self._current = self.steps[-1][1][part.start] = Microbatch()
        return self.whole(model, batch, draws, samples, part)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Have hooks on the layers; a pass through the whole of the examples inside the context is kept.

        What there is of one that fails is dropped.
        """
        self.clear()
        try:
            with ExitStack() as stack:
                for chain in {id(each.chain): each.chain for each in self.stretches.values()}.values():
                    self._watch(chain, stack)
                yield
        except BaseException:
            self.clear()
            raise
        finally:
            self._current = Microbatch()
        self.is_whole = True

    def clear(self) -> None:
        """Let go of all that is kept; the next pass through the model keeps it anew."""
        self.steps, self.is_whole = [], False

    def items(self) -> Iterator[tuple[Any, int, None]]:
        """Yield what is kept of each step, as examples are: with its number of gradient samples, and no draws."""
        return ((kept, samples, None) for samples, kept in self.steps)

    def _watch(self, chain: Chain, stack: ExitStack) -> None:
        own = [each for each in self.stretches.values() if each.chain is chain]
        starts, stops = {each.start for each in own}, {each.stop for each in own}
        needed = {number for each in own for number in range(each.start, each.stop)}
        for number, layer in enumerate(chain.layers):
            if number in needed:
                before = self._before(chain, number, number in starts)
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            if number + 1 in stops:
                stack.callback(layer.register_forward_hook(self._behind(chain, number + 1)).remove)

    def _before(self, chain: Chain, number: int, starts: bool) -> Callable:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = Call.of(args, kwargs)
            assert call is not None  # it is a layer of a chain
            hidden = compact(call.hidden.detach()) if starts else call.hidden.new_empty(0)
            self._current.calls[id(chain), number] = call.with_hidden(hidden)
            if call.hidden.requires_grad:
                return None
            # Gradients are wanted from here on, whatever targets this pass has. A copy: no one may write into a leaf.
            return call.with_hidden(call.hidden.detach().requires_grad_().clone()).arguments

        return hook

    def _behind(self, chain: Chain, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            made, current = first_tensor(output), self._current
            made.register_hook(lambda grads: current.grads.__setitem__((id(chain), number), compact(grads.detach())))

        return hook


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or a copy of one that would hold more memory than its own."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
