"""Passes over the examples: each fills the sums of some targets, and what it has done may outlive the run."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from cap_hf.collection.examples import CalibrationExamples
from cap_hf.collection.exchange import made_in
from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.collection.input_sums import InputSums
from cap_hf.collection.kept_states import Alone, KeptStates, WholeModel
from cap_hf.collection.plan import Plan
from cap_hf.collection.progress import Phase, Progress
from cap_hf.collection.running import Remembered, differentiable, frozen
from cap_hf.collection.shares import own_blocks
from cap_hf.collection.state import CollectionState, Item, note
from cap_hf.collection.stretches import Chain, Stretch, stretch_of
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.memory import ALIGNMENT, Arena, release
from cap_hf.method.losses import FisherLoss
from cap_hf.method.methods import METHODS
from cap_hf.method.sums import MAX_STRIPS, sums_per_block
from cap_hf.targets import Target, summarize

logger = logging.getLogger(__name__)


class Passes:
    """Goes through the examples for one pass of a plan after the other, or once more for one of them.

    Args:
        plan: whose passes they are.
        model: on its device; a pass that is gone through again must find it as the first one did.
        examples: of this process.
        order: names of the targets, as a backward pass meets them.
        loss: whose gradients are summed; None for inputs.
        config: how to prune.
        processes: of the run.
        progress: told what goes on.
        state: keeps what is done for a run that goes on, or None.
        chains: layers of the model that can be gone through alone.

    Attributes:
        means: for the name of each target of the passes so far the mean of its F's diagonal, over all processes.
        count: of gradient samples of a pass; 0 before the first.
        finished: how many passes an interrupted run had done with.

    Raises:
        CAPError: the examples are not those of the interrupted run.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        examples: CalibrationExamples,
        order: list[str],
        loss: FisherLoss | None,
        config: CAPConfig,
        processes: Processes,
        progress: Progress,
        state: CollectionState | None,
        chains: Sequence[Chain] = (),
    ) -> None:
        self.plan, self.model, self.examples, self.order, self.loss = plan, model, examples, order, loss
        self.config, self.processes, self.progress, self.state = config, processes, progress, state
        self.means: dict[str, float] = {}
        self.count = 0
        done = [] if state is None else state.passes()
        for each in done:
            self.means |= each["means"]
            self.count = each["count"]
        if state is not None and done:
            state.check_examples(examples, done[-1]["digest"])
        self.finished = len(done)
        # A pass that is gone through again sees the same model: what came between may have pruned or trained it.
        # Of what lies several times in the same memory, which no copy can be written to, nothing changes.
        own = [each for each in (*model.parameters(), *model.buffers()) if 0 not in each.stride()]
        self._model = Remembered(own) if plan.recollects else None
        self._digest: hashlib.blake2b | None = None
        # Where the sums of a pass go before those of the next come, these take their memory.
        largest = max(sum(own_bytes(target, processes) for target in each) for each in plan.passes)
        self._arena = Arena(largest if plan.recollects or plan.spilled else 0)
        self._states: KeptStates | None = None
        if plan.keeps and loss is not None:
            found = {number: stretch_of(chains, targets, plan.keeps) for number, targets in enumerate(plan.passes)}
            self._states = KeptStates({number: each for number, each in found.items() if each is not None}, loss)

    def skip(self, number: int) -> None:
        """Count a pass that an interrupted run had done with."""
        self._phase(number).skip(self.count)

    def collect(self, number: int) -> GradientSums | InputSums:
        """Return the sums of a pass; on all processes together.

        Raises:
            CAPError: there are no examples, or others than before; a loss or a sum is not finite; a layer mixes
                examples or is missing.
        """
        advance = self._phase(number)
        with differentiable(self.model), self._as_it_was(), frozen(self.model):
            states, statistic = self._states, self._statistic(number)
            stretch = None if states is None or not states.is_whole else states.stretches.get(number)
            try:
                if stretch is None:
                    self._fill(number, statistic, advance)
                else:
                    self._fill_alone(number, statistic, advance, stretch)
            except BaseException:
                # Hooks hold it until the garbage is collected, and memory is short.
                statistic.clear()
                raise
        self.count = statistic.count
        if not self.count:
            raise CAPError("the dataloader is empty: no example to collect gradients from")
        if not self.means and self.count < self.config.num_grads:
            logger.warning(
                "The data ended after %d of %d gradient samples; they are what the Fisher is estimated from.",
                self.count,
                self.config.num_grads,
            )
        if statistic.traced:
            self.means |= mean_diagonals(statistic, self.processes)
        return statistic

    def _fill_alone(self, number: int, statistic: GradientSums | InputSums, advance: Phase, stretch: Stretch) -> None:
        """Fill the sums of a pass from the hidden states that were kept before its layers and behind them."""
        assert isinstance(statistic, GradientSums)
        assert self._states is not None
        assert self._digest is not None
        statistic.through = Alone(stretch)
        if self.state is not None and number >= self.finished:
            self.state.begin_kept_pass(self._digest.copy(), len(self._states.steps))
        fill(statistic, self.model, self._states.items(), advance)

    def _fill(self, number: int, statistic: GradientSums | InputSums, advance: Phase) -> None:
        digest = hashlib.blake2b()
        examples = self._noted(digest) if self.plan.recollects else self.examples
        on_step: Callable[[int], None] = advance
        if self.state is not None and number >= self.finished:
            examples = self.state.begin_pass(number, statistic, examples)
            advance.skip(statistic.count)
            on_step = self.state.saving(number, statistic, advance)
        # Of a pass that an interrupted run has begun there are no hidden states.
        keeps = None if statistic.count else self._states
        if keeps is not None and isinstance(statistic, GradientSums):
            statistic.through = keeps
        with nullcontext() if keeps is None else keeps.keeping():
            fill(statistic, self.model, examples, on_step if keeps is None else releasing(on_step))
        differ = self._digest is not None and self._digest.digest() != digest.digest()
        # Said by all processes, or they would wait for each other.
        if any(each for (each,) in self.processes.gather_ints(int(differ))):
            raise CAPError(
                "the examples differ from those of the pass before, and passes need the same: give a dataloader or a "
                "list that does not change"
            )
        self._digest = digest

    def _noted(self, digest: "hashlib.blake2b") -> Iterator[Item]:
        for item in self.examples:
            note(digest, item)
            yield item

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Have the model as it was before the first pass, and afterwards as it is now."""
        if self._model is None:
            yield
            return
        now = Remembered(self._model.values)
        try:
            self._model.put_back()
            yield
        finally:
            now.put_back()

    def keep(self, number: int, statistic: GradientSums | InputSums) -> None:
        """Keep the sums of a pass for a run that goes on, until `finish`."""
        if self.state is not None and number >= self.finished:
            self.state.save(number, statistic)

    def finish(self, number: int) -> None:
        """Note for a run that goes on that a pass need not be gone through for its removal paths."""
        if self.state is not None and number >= self.finished:
            means = {target.name: self.means[target.name] for target in self.plan.passes[number]}
            self.state.finish_pass(number, {"means": means, "count": self.count})
            self.finished = number + 1

    def _phase(self, number: int) -> Phase:
        passes = len(self.plan.passes)
        kind = "group" if self.plan.recollects else "pass"
        name = "collecting" if passes == 1 else f"collecting, {kind} {number + 1} of {passes}"
        return self.progress.phase("collecting", "gradient", self.config.num_grads, name)

    def forget(self) -> None:
        """Let go of the hidden states that were kept, and of the memory for sums that are no longer there."""
        self._arena.clear()
        if self._states is not None:
            self._states.clear()
        release()

    def _statistic(self, number: int) -> GradientSums | InputSums:
        targets = self.plan.passes[number]
        if self.loss is None:
            return InputSums(targets, self.processes)
        dtype = getattr(torch, self.config.fisher_dtype)
        has_prior = METHODS[self.config.method].has_prior(self.config)
        inputs = InputSums(targets, self.processes) if has_prior else None
        # The sums of the pass before are gone, or on the disk.
        self._arena.reuse()
        unknown = [target.name for target in targets if target.name not in self.means]
        how = (self.plan.microbatch, self.order, WholeModel(self.loss), inputs, self._arena.zeros, unknown)
        return GradientSums(targets, self.processes, dtype, *how)


def fill(
    statistic: GradientSums | InputSums,
    model: nn.Module,
    examples: Iterable[Item],
    on_step: Callable[[int], None] = lambda samples: None,
) -> None:
    """Take examples through a frozen model, step by step, together with the other processes.

    Args:
        statistic: gets the sums.
        model: within `frozen`.
        examples: of this process: (batch, number of gradient samples, what is random in their loss or None). Processes
            may have different numbers of them.
        on_step: told after each step (of all processes) the number of its gradient samples.

    Raises:
        CAPError: a loss or a sum is not finite, or a layer mixes examples or is missing.
    """
    stream = iter(examples)
    with statistic.listening():
        while True:
            batch, samples, draws = next(stream, (None, 0, None))
            counts = [count for (count,) in statistic.processes.gather_ints(samples)]
            if not any(counts):
                break
            statistic.step(model, batch, draws, counts)
            statistic.count += sum(counts)
            on_step(sum(counts))
    statistic.finish()


def releasing(on_step: Callable[[int], None]) -> Callable[[int], None]:
    """Return what is called after each step that hidden states are kept of.

    They come to lie between what comes and goes, and the holes beside them would take as much memory again.
    """

    def release_then(samples: int) -> None:
        release()
        on_step(samples)

    return release_then


def own_bytes(target: Target, processes: Processes) -> int:
    """Return the bytes of the sums of the blocks of a target that this process owns, each strip at its place."""
    own = own_blocks(target, processes)
    entries = (own.stop - own.start) * sums_per_block(target.block_size)
    return entries * made_in(target).itemsize + MAX_STRIPS * ALIGNMENT


def mean_diagonals(statistic: GradientSums | InputSums, processes: Processes) -> dict[str, float]:
    """Return the mean of each traced target's diagonal of F, over the blocks of all processes, the same on each.

    Name blocks without any gradient in a warning, one for all targets.
    """
    means = {}
    dead, places = 0, []
    for target in statistic.traced:
        traces = statistic.traces(target)
        means[target.name] = float(traces.sum()) / (len(traces) * target.block_size * statistic.count)
        if here := int((traces == 0).sum()):
            dead += here
            places.append(f"{here} of {len(traces)} in {target.name}")
    # Where all are, an error is raised.
    if dead and any(means.values()) and processes.rank == 0:
        logger.warning(
            "%d blocks have no gradient at all; their weights are removed first: %s", dead, summarize(places, 3)
        )
    return means
