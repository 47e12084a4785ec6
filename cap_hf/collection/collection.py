"""A whole collection: planned, gone through in passes, kept on the disk where it must be, finished as a Fisher."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from cap_hf.collection.costs import Costs, measure
from cap_hf.collection.examples import CalibrationExamples
from cap_hf.collection.forecast import foresee
from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.collection.input_sums import InputSums
from cap_hf.collection.objective import make_loss, measure_deviations
from cap_hf.collection.plan import Plan, make_plan
from cap_hf.collection.progress import Progress
from cap_hf.collection.removal_paths import Tensors
from cap_hf.collection.resources import Resources
from cap_hf.collection.room import spill_folder
from cap_hf.collection.running import frozen
from cap_hf.collection.shares import own_blocks
from cap_hf.collection.spill import DiskTensors, SpilledSums
from cap_hf.collection.state import Checkpointing, CollectionState, Item, hash_weights
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.distributed.temporary import TemporaryFolder
from cap_hf.errors import CAPError
from cap_hf.method.fisher import BlockFisher, damps_of
from cap_hf.method.inputs import moment_size
from cap_hf.method.losses import FeatureLoss, FisherLoss
from cap_hf.method.methods import METHODS
from cap_hf.method.prior import InputPrior
from cap_hf.method.sums import SymmetricSums
from cap_hf.targets import Target, summarize

logger = logging.getLogger(__name__)

Find = Callable[[int | str], list[Target]]


class Collection:
    """Fills the sums of a method's Fisher from calibration examples.

    Args:
        model: in float32 or float64, on its device.
        config: how to prune.
        find: gives the model's targets for a block size.
        processes: of the run.
        resources: memory, passes and disk.
        progress: told what goes on.
        prunes: how many sparsities will be pruned to, for the time that is left.

    Attributes:
        plan: how it goes through memory; None before `run`.
        targets: as the plan has found them; none before `run`.
        state: what it keeps on the disk for a run that goes on, if it does.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CAPConfig,
        find: Find,
        processes: Processes,
        resources: Resources,
        progress: Progress,
        prunes: int = 1,
    ) -> None:
        self.model, self.config, self.find, self.processes = model, config, find, processes
        self.resources, self.progress, self.prunes = resources, progress, prunes
        self.method = METHODS[config.method]
        self.plan: Plan | None = None
        self.targets: list[Target] = []
        self.state: CollectionState | None = None
        self._folder: Path | None = None
        self._temporary: TemporaryFolder | None = None

    @property
    def batch_bytes(self) -> int | None:
        """Return the bytes of the matrices that are solved at a time, as the plan has them."""
        return None if self.plan is None else self.plan.batch_bytes

    def run(self, examples: CalibrationExamples, checkpointing: Checkpointing | None) -> BlockFisher:
        """Go over the examples as often as memory asks for.

        Args:
            examples: of this process.
            checkpointing: keep the state on the disk so that a run that was killed can go on.

        Returns:
            The Fisher of this process's blocks, with its damps.

        Raises:
            CAPError: there is too little memory, no data, a batch that does not fit, or a gradient that is not finite.
        """
        block_size = self.method.block_size(self.config)
        loss = self._prepare_loss(examples)
        costs = measure(self.model, examples.peek(), self.find("row" if block_size == "auto" else block_size), loss)
        self.plan = plan = self._make_plan(costs, examples, checkpointing)
        self.targets = [target for each in plan.passes for target in each]
        with frozen(self.model):
            fisher = self._passes(plan, examples, self._shared_order(costs), loss)
        if fisher.count < self.config.num_grads:
            logger.warning(
                "The data ended after %d of %d gradient samples; they are what the Fisher is estimated from.",
                fisher.count,
                self.config.num_grads,
            )
        return fisher

    def tensors(self, kind: str) -> Tensors:
        """Return a dict of tensors, on the disk where the plan spills or a run that goes on will want them."""
        if self._folder is not None:
            return DiskTensors(self._folder / kind, self.processes.device)
        if self.state is not None and kind.startswith(("orders", "losses")):
            return DiskTensors(self.state.folder / kind, self.processes.device)
        return {}

    def discard_state(self) -> None:
        """Remove what was kept on the disk for a run that goes on."""
        if self.state is not None:
            self.state.remove()
            self.state = None

    def close(self) -> None:
        """Remove what was spilled."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _prepare_loss(self, examples: CalibrationExamples) -> FisherLoss | None:
        """Return the loss of the config, ready for its gradients, and have the examples bring what it needs.

        None where the method sums no gradients: its examples need no labels, and its model no head.
        """
        if self.method.statistic != "gradients":
            return None
        loss = make_loss(self.config, self.model)
        examples.use(loss)
        if isinstance(loss, FeatureLoss):
            if examples.once:
                raise CAPError("fisher_loss='features' needs the examples twice: collect from a DataLoader or a list")
            batches = (batch for batch, _ in examples.batches())
            measure_deviations(loss, self.model, batches, self.processes, self.progress.disable)
        return loss

    def _shared_order(self, costs: Costs) -> list[str]:
        """Return the order in which a backward pass meets the targets, everywhere that of the first with examples."""
        return self.processes.share_first(costs.order)

    def _make_plan(self, costs: Costs, examples: CalibrationExamples, checkpointing: Checkpointing | None) -> Plan:
        block_size = self.method.block_size(self.config)
        dtype = getattr(torch, self.config.fisher_dtype)
        if self.method.statistic == "inputs":
            plan = Plan([self.find(block_size)], block_size, costs.samples, costs.samples)
        else:
            prior = self.method.has_prior(self.config)
            refits = self.method.refits(self.config)
            plan = make_plan(self.find, block_size, self.resources, costs, self.processes, dtype, prior, refits)
        if checkpointing is not None:
            facts = {f"config {name}": value for name, value in self.config.to_dict().items()}
            facts |= {"model weights": hash_weights(self.model), "number of processes": self.processes.world}
            facts |= {"number of examples": examples.size, "PyTorch": torch.__version__}
            self.state = CollectionState(checkpointing, self.processes, facts, plan.to_dict())
            plan = plan.like(self.state.plan, self.find)
        examples.limit = plan.step
        passes = len(plan.passes)
        if passes > 1 and examples.once:
            raise CAPError(f"{passes} passes need the examples again: collect from a DataLoader or a list of batches")
        if plan.spilled and self.state is not None:
            self._folder = self.state.folder / "spill"
            self._folder.mkdir(exist_ok=True)
        elif plan.spilled:
            self._temporary = TemporaryFolder(dir=spill_folder(self.resources))
            self._folder = Path(self._temporary.name)
        foreseen = foresee(plan, costs, self.config, self.processes, self._folder, self.prunes)
        seconds = sum(each.seconds for each in foreseen if each.kind == "collecting")
        # What is over before a bar would show needs no plan either.
        if seconds > 2 or passes > 1:
            self.progress.say(plan.describe(seconds, self._folder))
        self.progress.start(foreseen)
        return plan

    def _statistic(
        self, plan: Plan, targets: list[Target], order: list[str], loss: FisherLoss | None
    ) -> GradientSums | InputSums:
        if loss is None:
            return InputSums(targets, self.processes)
        dtype = getattr(torch, self.config.fisher_dtype)
        inputs = InputSums(targets, self.processes) if self.method.has_prior(self.config) else None
        return GradientSums(targets, self.processes, dtype, plan.microbatch, order, loss, inputs)

    def _passes(
        self, plan: Plan, examples: CalibrationExamples, order: list[str], loss: FisherLoss | None
    ) -> BlockFisher:
        """Return the Fisher of all targets, from as many passes over the examples as the plan has."""
        sums, moments = self._store("sums", lambda target: target.block_size), self._store("moments", moment_size)
        means: dict[str, float] = {}
        count, finished = 0, [] if self.state is None else self.state.passes()
        if self.state is not None and finished:
            self.state.check_examples(examples, finished[-1]["digest"])
        for number, targets in enumerate(plan.passes):
            name = "collecting"
            if len(plan.passes) > 1:
                name = f"collecting, pass {number + 1} of {len(plan.passes)}"
            advance = self.progress.phase("collecting", "gradient", self.config.num_grads, name)
            if number < len(finished):
                means |= finished[number]["means"]
                count = finished[number]["count"]
                advance.skip(count)
                continue
            statistic = self._statistic(plan, targets, order, loss)
            if self.state is None:
                fill(statistic, self.model, examples, advance)
            else:
                rest = self.state.begin_pass(number, statistic, examples)
                advance.skip(statistic.count)
                fill(statistic, self.model, rest, self.state.saving(number, statistic, advance))
            count = statistic.count
            if not count:
                raise CAPError("the dataloader is empty: no example to collect gradients from")
            own = mean_diagonals(statistic, self.processes)
            means |= own
            if self.state is not None and self._folder is None:
                self.state.save(number, statistic)
            sums.update(statistic.sums)
            moments.update(statistic.moments)
            statistic.clear()
            if self.state is not None and self._folder is not None:
                self.state.finish_pass(number, {"means": own, "count": count})
        return BlockFisher(
            sums=sums,
            count=count,
            damps=damps_of(means, self.method.damp(self.config), self.config.absolute_damp),
            owned={target.name: own_blocks(target, self.processes) for target in self.targets},
            shared=self.method.statistic == "inputs",
            prior=InputPrior(moments, self.config.prior_strength) if self.method.has_prior(self.config) else None,
        )

    def _store(self, kind: str, size: Callable[[Target], int]) -> dict[str, SymmetricSums] | SpilledSums:
        """Return what takes the sums of all passes: on the disk where the plan spills, else in memory."""
        if self._folder is None:
            return {}
        sizes = {target.name: size(target) for target in self.targets}
        return SpilledSums(self._folder / kind, sizes, self.processes.device)


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


def mean_diagonals(statistic: GradientSums | InputSums, processes: Processes) -> dict[str, float]:
    """Return the mean of each target's diagonal of F, over the blocks of all processes, exactly the same on each.

    Name blocks without any gradient in a warning, one for all targets.
    """
    means = {}
    dead, places = 0, []
    for target in statistic.targets:
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
