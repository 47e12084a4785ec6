"""What a gradient sample costs, measured on the first examples, and one bar that shows how far a whole job is."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from cap_hf.method.fisher import Batch, sums_per_block
from cap_hf.method.gradients import GradientSamples, StepGradients
from cap_hf.targets import Target

# Gradient samples that are measured.
MEASURED = 2
# What lives during a pass beside the tensors that are saved for the backward pass.
PASSING = 1.25
# Multiplications a weight and B^2 that take as long as an elimination, with the inverse before it, and as solving for
# the weights that stay: these run slower than large matrix products.
ELIMINATION, RECONSTRUCTION = 8.0, 2.0


@dataclass
class Costs:
    """What the plan and the bar start from.

    Attributes:
        samples: gradient samples of the first batch.
        bytes: that one of them takes while it is in the model.
        kept: bytes that stay of it until the step ends: the inputs of the targets, and the gradients of their outputs.
        widest: bytes of the largest of these.
        seconds: of its forward and backward pass, with its gradients.
        work: multiplications that it takes in all.
    """

    samples: int = 0
    bytes: int = 0
    kept: int = 0
    widest: int = 0
    seconds: float = 0.0
    work: float = 1.0


def measure(
    model: nn.Module, examples: Iterable[tuple[Batch, int, torch.Tensor | None]], targets: Sequence[Target]
) -> Costs:
    """Take the first gradient samples through the model, forward and backward.

    Args:
        model: in eval mode.
        examples: as `BlockFisher.collect` takes them; none cost nothing.
        targets: whose gradients are made.

    Raises:
        CAPError: a layer mixes examples.
    """
    batch, samples, _ = next(iter(examples), (None, 0, None))
    if batch is None:
        return Costs()
    count = min(MEASURED, samples)
    # Copies: a view's memory would count as that of the whole batch.
    batch = {name: value[: len(value) // samples * count].clone() for name, value in batch.items()}
    held: dict[int, int] = {}
    kept: dict[int, int] = {}
    outputs: list[int] = []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    work = 0.0

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        storage = hold(args[0]).untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        outputs.append(output.nbytes)

    def make(target: Target, gradients: StepGradients) -> None:
        nonlocal work
        height = min(len(target.weight), 64)
        (part,) = gradients.parts
        part.rows(0, height, part.inputs.new_empty(count, height, target.row_size))
        positions = part.inputs.shape[1]
        shared = sums_per_block(target.block_size) / target.block_size
        # Forward, backward, gradients, and sums.
        work += target.weight.numel() * (3 * positions + shared)

    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    handles = [target.module.register_forward_hook(keep) for target in targets]
    start = time.perf_counter()
    try:
        with (
            GradientSamples(targets, make) as hooks,
            torch.enable_grad(),
            saved_tensors_hooks(hold, lambda saved: saved),
        ):
            hooks.start(count)
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            loss = F.cross_entropy(logits.float(), batch["labels"], reduction="sum")
            if loss.requires_grad:
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
    seconds = (time.perf_counter() - start) / count
    return Costs(
        samples,
        bytes=int(PASSING * sum(held.values()) / count),
        kept=(sum(kept.values()) + sum(outputs)) // count,
        widest=max((*kept.values(), *outputs), default=0) // count,
        seconds=seconds,
        work=max(work, 1.0),
    )


class Progress:
    """One bar for a whole job: the phase it is in, how fast that goes, and the time left.

    Args:
        disable: show nothing.
        prunes: how many sparsities are solved for.
    """

    def __init__(self, disable: bool, prunes: int = 1) -> None:
        self.disable, self.prunes = disable, prunes
        self.bar: transformers_logging.tqdm | None = None
        self.work = 0.0
        self._left = 0
        self._solving: dict[str, float] = {}

    def start(self, targets: Sequence[Target], work: float, shares: int) -> None:
        """Begin a job.

        Args:
            targets: that are pruned.
            work: of its collection, in multiplications.
            shares: processes that share the blocks.
        """
        self.close()
        block = sum(target.weight.numel() * float(target.block_size) ** 2 for target in targets) / shares
        self._solving = {"eliminating": ELIMINATION * block, "reconstructing": RECONSTRUCTION * block}
        self.work, self._left = work, self.prunes
        self._open(work + self._solving["eliminating"] + self.prunes * self._solving["reconstructing"])

    def _open(self, total: float) -> None:
        self.bar = transformers_logging.tqdm(
            total=total,
            delay=2,
            disable=self.disable,
            bar_format="{desc}{percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
        )

    def phase(self, name: str, unit: str, count: int, work: float | None = None) -> "Phase":
        """A phase of `count` steps, and the `work` of all of them where it is not that of solving."""
        work = self._solving.get(name, float(count)) if work is None else work
        if self.bar is None:
            # One more sparsity than was foreseen.
            self._open(work)
        return Phase(self.bar, name, unit, work / max(count, 1))

    def pruned(self) -> None:
        """One sparsity is solved for; after the last the bar is full and goes."""
        self._left -= 1
        if self._left <= 0:
            self.close()

    def say(self, text: str) -> None:
        """Print a line for whoever watches the bar."""
        if not self.disable:
            print(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Phase:
    """What a loop calls with the number of steps that it has done."""

    def __init__(self, bar: transformers_logging.tqdm, name: str, unit: str, work: float) -> None:
        self.bar, self.unit, self.work = bar, unit, work
        self.done, self.begun = 0, time.perf_counter()
        bar.set_description(name.capitalize(), refresh=False)

    def __call__(self, count: int) -> None:
        self.done += count
        speed = self.done / max(time.perf_counter() - self.begun, 1e-9)
        self.bar.set_postfix_str(f"{speed:.1f} {self.unit}/s", refresh=False)
        self.bar.update(count * self.work)
