"""A whole collection: planned, gone through in passes, kept on the disk where it must be, finished as a Fisher."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from cap_hf.collection.chains import agreed
from cap_hf.collection.costs import Costs, measure
from cap_hf.collection.examples import CalibrationExamples
from cap_hf.collection.forecast import foresee
from cap_hf.collection.objective import choose_loss, make_loss, measure_deviations
from cap_hf.collection.parts import Tensors
from cap_hf.collection.passes import Passes
from cap_hf.collection.plan import Plan
from cap_hf.collection.planning import make_plan
from cap_hf.collection.precision import check_precision
from cap_hf.collection.progress import Progress
from cap_hf.collection.recollection import Recollection
from cap_hf.collection.resources import Afterwards, Resources
from cap_hf.collection.room import spill_folder
from cap_hf.collection.running import Batches
from cap_hf.collection.shares import own_blocks
from cap_hf.collection.spill import DiskTensors, SpilledSums
from cap_hf.collection.state import Checkpointing, CollectionState, hash_weights
from cap_hf.collection.together import together
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
from cap_hf.targets import Target
from cap_hf.towers import taken_by, tower_of

Find = Callable[[int | str], list[Target]]
# Of what a state holds: a run goes on from its own version alone.
STATE_VERSION = 2


class Collection:
    """Fills the sums of a method's Fisher from calibration examples.

    Args:
        model: in float32 or float64, on its device.
        dataloader: as `CalibrationExamples` takes it.
        config: how to prune.
        find: gives the model's targets for a block size.
        processes: of the run.
        resources: memory, passes and disk.
        progress: told what goes on.
        afterwards: what it is for.

    Attributes:
        config: how to prune; it says the loss of the gradients too.
        plan: how it goes through memory; None before `run`.
        targets: as the plan has found them; none before `run`.
        state: what it keeps on the disk for a run that goes on, if it does.
        recollection: brings back the sums of a pass, where those of all are not kept.

    Raises:
        CAPError: as of `CalibrationExamples`, of its `first`, and of `check_precision`.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Batches,
        config: CAPConfig,
        find: Find,
        processes: Processes,
        resources: Resources,
        progress: Progress,
        afterwards: Afterwards,
    ) -> None:
        self.model, self.config, self.find, self.processes = model, config, find, processes
        self.resources, self.progress, self.afterwards = resources, progress, afterwards
        self.method = METHODS[config.method]
        if self.method.statistic is not None:
            check_precision(find("row"), processes.device)
        self.examples = CalibrationExamples(dataloader, config, processes, taken_by(tower_of(model)))
        if self.method.statistic == "gradients":
            chosen = choose_loss(config.fisher_loss, model, self.examples.first(), processes)
            self.config = replace(config, fisher_loss=chosen)
        self.plan: Plan | None = None
        self.targets: list[Target] = []
        self.state: CollectionState | None = None
        self.recollection: Recollection | None = None
        self._folder: Path | None = None
        self._temporary: TemporaryFolder | None = None

    @property
    def batch_bytes(self) -> int | None:
        """Return the bytes of the matrices that are solved at a time, as the plan has them."""
        return None if self.plan is None else self.plan.batch_bytes

    def run(self, checkpointing: Checkpointing | None) -> BlockFisher:
        """Go over the examples as often as memory asks for.

        Args:
            checkpointing: keep the state on the disk so that a run that was killed can go on.

        Returns:
            The Fisher of this process's blocks, with its damps; without both where there is a `recollection`, which
            gives them when it loads.

        Raises:
            CAPError: there is too little memory, no data, a batch that does not fit, or a gradient that is not finite.
        """
        try:
            loss = self.prepare_loss()
            costs = self.measure(loss)
            self.plan = plan = self._begin(costs, checkpointing)
            self.targets = plan.targets
            order = self._shared_order(costs)
            how = (self.config, self.processes, self.progress, self.state)
            passes = Passes(plan, self.model, self.examples, order, loss, *how, costs.chains)
            return self._recollected(plan, passes) if plan.recollects else self._kept(plan, passes)
        finally:
            # They may be all images of a list.
            del self.examples

    def prepare_loss(self, first_alone: bool = False) -> FisherLoss | None:
        """Return the loss of the config, ready for its gradients, and have the examples bring what it needs.

        None where the method sums no gradients: its examples need no labels, and its model no head.

        Args:
            first_alone: let the first batch stand for all where the loss looks at the examples before.
        """
        if self.method.statistic != "gradients":
            return None
        loss = make_loss(self.config, self.model)
        self.examples.use(loss)
        if isinstance(loss, FeatureLoss):
            if self.examples.once:
                raise CAPError("fisher_loss='features' needs the examples twice: collect from a DataLoader or a list")
            batches = (batch for batch, _ in islice(self.examples.batches(), 1 if first_alone else None))
            measure_deviations(loss, self.model, batches, self.processes, self.progress.disable)
        return loss

    def measure(self, loss: FisherLoss | None) -> Costs:
        """Return what a gradient sample costs, of the first examples."""
        block_size = self.method.block_size(self.config)
        targets = self.find("row" if block_size == "auto" else block_size)
        costs = measure(self.model, self.examples.peek(), targets, loss)
        return replace(costs, chains=agreed(costs.chains, self.processes))

    def plan_for(self, costs: Costs, processes: Processes, available: int | None = None) -> Plan:
        """Return the plan for such costs and processes; `available` as of `make_plan`."""
        if self.method.statistic == "inputs":
            return Plan([self.find(self.method.block_size(self.config))], "row", costs.samples, costs.samples)
        shared = isinstance(self.examples.dataloader, DataLoader)
        how = (self.resources, costs, processes, self.afterwards, available, shared)
        return make_plan(self.find, self.config, *how)

    def tensors(self, kind: str) -> Tensors:
        """Return a dict of tensors, on the disk where the plan spills or a run that goes on will want them."""
        if self._folder is not None:
            return DiskTensors(self._folder / kind, self.processes.device)
        if self.state is not None and kind.startswith(("orders", "losses")):
            return DiskTensors(self.state.folder / kind, self.processes.device)
        return {}

    def together(self, count: int) -> int:
        """Return how many of `count` sparsities are solved for together; as `cap_hf.collection.together.together`."""
        if self.plan is None:
            return 1
        count = self.afterwards.prunes if self.plan.recollects else count
        return together(self.plan, self.targets, self.processes, count, self._folder)

    def discard_state(self) -> None:
        """Remove what was kept on the disk for a run that goes on."""
        if self.state is not None:
            self.state.remove()
            self.state = None

    def close(self) -> None:
        """Remove what was spilled, and let go of sums that are collected anew."""
        if self.recollection is not None:
            self.recollection.clear()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _shared_order(self, costs: Costs) -> list[str]:
        """Return the order in which a backward pass meets the targets, everywhere that of the first with examples."""
        return self.processes.share_first(costs.order)

    def _begin(self, costs: Costs, checkpointing: Checkpointing | None) -> Plan:
        """Return the plan, or that of the interrupted run; state, disk and bar are ready then."""
        plan, examples = self.plan_for(costs, self.processes), self.examples
        if checkpointing is not None:
            facts = {f"config {name}": value for name, value in self.config.to_dict().items()}
            facts |= {"model weights": hash_weights(self.model), "number of processes": self.processes.world}
            facts |= {"number of examples": examples.size, "PyTorch": torch.__version__}
            facts |= {"version of the state": STATE_VERSION}
            self.state = CollectionState(checkpointing, self.processes, facts, plan.to_dict())
            plan = plan.like(self.state.plan, self.find)
        examples.limit = plan.step
        passes = plan.num_passes
        if examples.once and (passes > 1 or plan.recollects):
            raise CAPError(
                f"{max(passes, 2)} passes need the examples again: collect from a DataLoader or a list of batches"
            )
        if plan.spilled and self.state is not None:
            self._folder = self.state.folder / "spill"
            self._folder.mkdir(exist_ok=True)
        elif plan.spilled:
            self._temporary = TemporaryFolder(dir=spill_folder(self.resources))
            self._folder = Path(self._temporary.name)
        foreseen = foresee(plan, costs, self.config, self.processes, self._folder, self.afterwards.prunes)
        seconds = sum(each.seconds for each in foreseen if each.kind == "collecting")
        # What is over before a bar would show needs no plan either.
        if seconds > 2 or passes > 1:
            self.progress.say(plan.describe(seconds, self._folder))
        self.progress.start(foreseen)
        return plan

    def _kept(self, plan: Plan, passes: Passes) -> BlockFisher:
        """Return the Fisher of all targets, whose sums stay in memory or on the disk."""
        sums, moments = self._store("sums", lambda target: target.block_size), self._store("moments", moment_size)
        for number in range(len(plan.passes)):
            if number < passes.finished:
                passes.skip(number)
                continue
            statistic = passes.collect(number)
            if self._folder is None:
                passes.keep(number, statistic)
            sums.update(statistic.sums)
            moments.update(statistic.moments)
            statistic.clear()
            if self._folder is not None:
                passes.finish(number)
        passes.forget()
        return self._fisher(passes, sums, moments)

    def _recollected(self, plan: Plan, passes: Passes) -> BlockFisher:
        """Return the Fisher of all targets, without sums until `recollection` loads them."""
        sums: dict[str, SymmetricSums] = {}
        moments: dict[str, SymmetricSums] = {}
        fisher = self._fisher(passes, sums, moments)

        def on_load(targets: Sequence[Target]) -> None:
            fisher.count, fisher.damps = passes.count, self._damps(passes)
            fisher.owned |= {target.name: own_blocks(target, self.processes) for target in targets}

        self.recollection = Recollection(passes, sums, moments, on_load)
        return fisher

    def _fisher(
        self, passes: Passes, sums: Mapping[str, SymmetricSums], moments: Mapping[str, SymmetricSums]
    ) -> BlockFisher:
        return BlockFisher(
            sums=sums,
            count=passes.count,
            damps=self._damps(passes),
            owned={target.name: own_blocks(target, self.processes) for target in self.targets},
            shared=self.method.statistic == "inputs",
            prior=InputPrior(moments, self.config.prior_strength) if self.method.has_prior(self.config) else None,
        )

    def _damps(self, passes: Passes) -> dict[str, float]:
        """Return the damps of the targets for which they can be said."""
        damp, absolute, means = self.method.damp(self.config), self.config.absolute_damp, passes.means
        if len(means) < len(self.targets):
            if absolute:
                return dict.fromkeys(means, damp)
            # That of a target without any gradient is made from those of all others.
            means = {name: mean for name, mean in means.items() if mean}
            if not means:
                return {}
        return damps_of(means, damp, absolute)

    def _store(self, kind: str, size: Callable[[Target], int]) -> dict[str, SymmetricSums] | SpilledSums:
        """Return what takes the sums of all passes: on the disk where the plan spills, else in memory."""
        if self._folder is None:
            return {}
        sizes = {target.name: size(target) for target in self.targets}
        return SpilledSums(self._folder / kind, sizes, self.processes.device)
