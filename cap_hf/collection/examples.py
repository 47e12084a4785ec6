"""The examples a Fisher is estimated from: the same, in the same order, however often and by however many processes."""

import random
from collections.abc import Collection, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader

from cap_hf.collection.batches import check_dataloader, read, to_batch
from cap_hf.collection.running import Batch, Batches
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.method.losses import FisherLoss
from cap_hf.towers import taken_by, tower_of


class CalibrationExamples:
    """This process's batches, cut to the examples asked for, as a collection takes them.

    Every iteration begins with the config's seed, so that a dataloader which shuffles gives the same order again.

    Args:
        dataloader: batches of `pixel_values` and `labels`. A DataLoader, not prepared by accelerate, is shared out
            between the processes; any other iterable holds this process's own share.
        config: for the number of gradient samples, their grouping and the seed.
        processes: of the run.
        taken: what the model can be called with beside `pixel_values`, by name.

    Attributes:
        limit: gradient samples of a step, at most; larger batches are split.

    Raises:
        CAPError: what is given is no dataloader.
    """

    def __init__(
        self,
        dataloader: Batches,
        config: CAPConfig,
        processes: Processes,
        taken: Collection[str] = (),
    ) -> None:
        check_dataloader(dataloader)
        self.dataloader, self.config, self.processes, self.taken = dataloader, config, processes, taken
        self.limit: int | None = None
        # What can be gone through once is peeked into by the plan, and then gone through.
        self.once = isinstance(dataloader, Iterator)
        self._first: list[Batch] = []
        self.wanted = config.num_grads * config.samples_per_grad
        self.needed: tuple[str, ...] = ("pixel_values",)
        self.repeats = 1
        self.draws: torch.Tensor | None = None

    def use(self, loss: FisherLoss) -> None:
        """Give what a loss needs with every example: labels, or what is random in it.

        Raises:
            CAPError: its gradient samples per example do not divide those that the config asks for.
        """
        self.needed = ("pixel_values", "labels") if loss.needs_labels else ("pixel_values",)
        self.repeats = loss.repeats
        if self.config.num_grads % loss.repeats:
            raise CAPError(
                f"num_grads={self.config.num_grads} is not a multiple of feature_projections={loss.repeats}: change one"
            )
        self.wanted = self.config.num_grads * self.config.samples_per_grad // loss.repeats
        # For all examples at once: each gets the same on whatever process it lands.
        drawn = loss.draws(self.wanted * loss.repeats, self.config.seed)
        self.draws = None if drawn is None else drawn.view(loss.repeats, self.wanted)

    @property
    def size(self) -> int | None:
        """Return how many examples (batches, where it is not a DataLoader) there are to choose from, if it is known."""
        everything = getattr(self.dataloader, "dataset", self.dataloader)
        return len(everything) if isinstance(everything, Sized) else None

    def first(self) -> Batch | None:
        """Return the first batch, which the next iteration still has; None where there is none.

        Raises:
            CAPError: it is no batch, see `to_batch`, or cannot be read.
        """
        if self.once:
            self._first = self._first or list(islice(read(self.dataloader), 1))
            return to_batch(self._first[0], self.needed, self.taken) if self._first else None
        return next((batch for batch, _ in islice(self.batches(), 1)), None)

    def peek(self) -> Iterator[tuple[Batch, int, torch.Tensor | None]]:
        """Return the first batch alone with its draws, which the next iteration still has."""
        if not self.once:
            return islice(self, 1)
        self.first()
        alone = CalibrationExamples(self._first, self.config, self.processes, self.taken)
        alone.needed, alone.repeats, alone.draws, alone.wanted = self.needed, self.repeats, self.draws, self.wanted
        return iter(alone)

    def __iter__(self) -> Iterator[tuple[Batch, int, torch.Tensor | None]]:
        """Yield the examples of a step, how many gradient samples they are, and what is random in these."""
        group = self.config.samples_per_grad
        for batch, start in self.batches():
            length = len(batch["pixel_values"])
            # Once over and again, not each example several times: those of a group are different ones.
            batch = {name: torch.cat([value] * self.repeats) for name, value in batch.items()}
            draws = None if self.draws is None else self.draws[:, start : start + length].flatten()
            length *= self.repeats
            step = length if self.limit is None else self.limit * group
            for first in range(0, length, step):
                part = slice(first, min(first + step, length))
                yield (
                    {name: value[part] for name, value in batch.items()},
                    (part.stop - part.start) // group,
                    None if draws is None else draws[part],
                )

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """Yield the batches of this process as they are, on its device, and where each begins among all examples."""
        group = self.config.samples_per_grad
        with seeded(self.dataloader, self.config.seed):
            loader, rank, world, size = self._share()
            seen = 0
            for index, given in enumerate(read(loader)):
                batch = to_batch(given, self.needed, self.taken)
                count = len(batch["pixel_values"])
                full = size or count
                if full % group:
                    raise CAPError(f"the batch size {full} is not a multiple of samples_per_grad={group}")
                # Where this batch's examples stand among those of all processes.
                start = seen if size is None or world == 1 else (index * world + rank) * size
                seen += count
                length = min(count, self.wanted - start) // group * group
                if length <= 0:
                    break
                # From pinned memory, where the loader has it, CUDA copies while this goes on.
                moved = (
                    (name, value[:length].to(self.processes.device, non_blocking=True)) for name, value in batch.items()
                )
                yield {name: keepable(value) for name, value in moved}, start

    def _share(self) -> tuple[Iterable[Batch], int, int, int | None]:
        """Return what this process reads, its number among those that share it, how many these are, the batch size."""
        if self.once:
            first, self._first = self._first, []
            return chain(first, self.dataloader), 0, 1, None
        if not isinstance(self.dataloader, DataLoader):
            return self.dataloader, 0, 1, None
        size = getattr(self.dataloader.batch_sampler, "batch_size", None)
        if self.processes.world == 1:
            return self.dataloader, 0, 1, size
        if size is None:
            raise CAPError("several processes share batches of one size: give the dataloader a batch_size")
        # Even shares would repeat examples, and the Fisher would count them twice.
        shared = prepare_data_loader(
            self.dataloader,
            num_processes=self.processes.world,
            process_index=self.processes.rank,
            put_on_device=False,
            even_batches=False,
            rng_types=["generator"],
        )
        return shared, self.processes.rank, self.processes.world, size


def first_examples(
    dataloader: Batches,
    number: int,
    config: CAPConfig,
    processes: Processes,
    model: nn.Module,
) -> list[tuple[Batch, int]]:
    """Return this process's batches of the first examples of a dataloader, and where each begins among those of all.

    Args:
        dataloader: as `CalibrationExamples` takes it; labels are not needed.
        number: of examples, of all processes; more where else a process would have none.
        config: of the run; its seed is what a dataloader that shuffles begins with.
        processes: of the run.
        model: that they are for.
    """
    batch_size = getattr(getattr(dataloader, "batch_sampler", None), "batch_size", None) or 1
    wanted = replace(config, num_grads=max(number, (processes.world - 1) * batch_size + 1), samples_per_grad=1)
    examples = CalibrationExamples(dataloader, wanted, processes, taken_by(tower_of(model)))
    # Of what is not shared out each process has its own first example.
    before = 0 if isinstance(dataloader, DataLoader) else processes.rank * wanted.num_grads
    return [(batch, before + start) for batch, start in examples.batches()]


def keepable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that a backward pass may keep: a copy of one that was made inside `torch.inference_mode()`."""
    return tensor.clone() if tensor.is_inference() else tensor


def whole_groups(batch_size: int, config: CAPConfig) -> int:
    """Return a batch size that holds whole gradient samples, near the one asked for.

    Raises:
        CAPError: the one asked for is below 1.
    """
    if batch_size < 1:
        raise CAPError(f"the batch size {batch_size} must be at least 1")
    return max(1, batch_size // config.samples_per_grad) * config.samples_per_grad


@contextmanager
def seeded(dataloader: Batches, seed: int) -> Iterator[None]:
    """Let everything that a dataloader may draw from begin with a seed; what was there before is put back."""
    sampler = getattr(dataloader, "sampler", None)
    owners: list[Any] = [owner for owner in (dataloader, sampler) if hasattr(owner, "generator")]
    before = [owner.generator for owner in owners]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    for owner in owners:
        owner.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        for owner, generator in zip(owners, before, strict=True):
            owner.generator = generator
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
