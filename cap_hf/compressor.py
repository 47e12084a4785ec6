"""CAPCompressor: collect once, prune to any sparsity, save."""

import logging
import tempfile
from collections.abc import Iterable, MutableMapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.collection.costs import Progress, measure
from cap_hf.collection.examples import CalibrationExamples
from cap_hf.collection.plan import Plan, Resources, disk_seconds, make_plan, spill_folder
from cap_hf.collection.solver import Solver
from cap_hf.collection.state import Checkpointing, CollectionState, hash_weights
from cap_hf.collection.storage import DiskTensors, SpilledSums
from cap_hf.config import CAPConfig, NMPattern
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.masks import describe_masks
from cap_hf.method.allocation import allocate_global, allocate_uniform, path_losses
from cap_hf.method.baselines import InputHessian
from cap_hf.method.fisher import Batch, BlockFisher, block_shares, damps
from cap_hf.report import LayerReport, PruneReport
from cap_hf.targets import Target, find_targets, summarize

logger = logging.getLogger(__name__)


class CAPCompressor:
    """Prunes a transformers image classifier with the Correlation-Aware Pruner (arXiv 2210.09223).

    Args:
        model: in float32 or float64 (half precision loses the gradients of single examples).
        config: how to prune; `CAPConfig()` if None.
        accelerator: from accelerate; with several processes each takes its share of the examples and of the blocks.
        disable_tqdm: no progress bar.
        resources: memory, passes and disk; `Resources()` if None.
        prunes: how many sparsities will be pruned to, for the time left that the bar shows.

    Attributes:
        targets: what is pruned.
        fisher: of this process's blocks, after `collect`.
        plan: how the collection went through memory.
        report: of the last `prune`.

    Raises:
        CAPError: the model has no targets, or the config does not fit them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: CAPConfig | None = None,
        accelerator: Accelerator | None = None,
        disable_tqdm: bool = False,
        resources: Resources | None = None,
        prunes: int = 1,
    ) -> None:
        self.model = model
        self.config = config or CAPConfig()
        self.accelerator = accelerator or Accelerator()
        self.processes = Processes(self.accelerator)
        self.resources = resources or Resources()
        self.progress = Progress(disable_tqdm or not self.accelerator.is_main_process, prunes)
        self.targets = self._find_targets("row" if self._block_size == "auto" else self._block_size)
        self.fisher: BlockFisher | None = None
        self.plan: Plan | None = None
        self.report: PruneReport | None = None
        self._pattern: NMPattern | None = None
        self._damps: dict[str, float] = {}
        self.state: CollectionState | None = None
        self._spill: Path | None = None
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._forget()

    def collect(
        self, dataloader: DataLoader | Iterable[Batch], checkpointing: Checkpointing | None = None
    ) -> "CAPCompressor":
        """Estimate the Fisher once, from `num_grads * samples_per_grad` examples, and remember the weights.

        What does not fit into memory at once is collected in several passes over the examples and kept on the disk;
        a warning says so.

        Args:
            dataloader: batches of `pixel_values` and `labels`. A DataLoader, not prepared by accelerate, is
                shared out between the processes; any other iterable holds this process's own share. The batch
                size must be a multiple of `samples_per_grad`.
            checkpointing: keep the state on the disk so that a run that was killed can go on; what it leaves is
                removed by `discard_state`.

        Returns:
            self, ready for any number of `prune`.

        Raises:
            CAPError: there is too little memory, no data, a batch that does not fit, or a gradient that is not
                finite.
        """
        self._forget()
        if self.config.method == "magnitude":
            self._remember_weights()
            return self
        if self.model.dtype in (torch.float16, torch.bfloat16):
            raise CAPError(f"the model is in {self.model.dtype}: load it in float32 to collect gradients")
        if self.accelerator.device.type == "mps":
            raise CAPError("Apple's MPS has no float64, which the solver needs: set ACCELERATE_USE_CPU=true")
        self.model.to(self.accelerator.device)
        examples = CalibrationExamples(dataloader, self.config, self.processes)
        training = self.model.training
        self.model.eval()
        try:
            self._make_plan(examples, checkpointing)
            self.fisher = self._collect_passes(examples)
        finally:
            self.model.train(training)
        self._remember_weights()
        return self

    def prune(self, sparsity: float | None = None) -> PruneReport:
        """Prune the model in place, from the weights it had at `collect`, to exactly this sparsity.

        Args:
            sparsity: share of all target weights that are 0 afterwards, in [0, 1); None for an N:M allocation.

        Returns:
            What was removed where; also kept as `self.report`.

        Raises:
            CAPError: the sparsity is out of range, below the model's, or not the N:M pattern's; `collect` was not
                called; a block Fisher cannot be inverted.
        """
        sparsity = self._check_sparsity(sparsity)
        solver = Solver(self.config, self.fisher, self._damps)
        if not self._orders or self._pattern != self.config.pattern:
            self._eliminate(solver)
        counts = self._allocate(sparsity)
        pruned, losses = self._tensors("pruned"), []
        advance = self.progress.phase("reconstructing", "block", sum(map(len, counts)))
        for target, count in zip(self.targets, counts, strict=True):
            weights, order = self._weights[target.name], self._orders[target.name]
            new, loss = solver.reconstruct(target, weights, order, count, advance)
            losses.append(loss or 0.0)
            pruned[target.name] = new
        losses = self.processes.sum(torch.tensor(losses, dtype=torch.float64, device=self.accelerator.device))
        # Nothing is changed before everything is solved.
        report = PruneReport(self.config.method, self.config.allocation, self.config.selection, sparsity)
        for target, loss in zip(self.targets, losses.tolist(), strict=True):
            blocks = self.processes.assemble(pruned.pop(target.name), block_shares(target, self.processes))
            target.weight.data.copy_(target.from_blocks(blocks))
            loss = None if self.config.method == "magnitude" else loss
            (mask,) = describe_masks([target])
            report.layers.append(LayerReport(**mask, block_size=target.block_size, loss=loss))
        collapsed = [layer.name for layer in report.layers if layer.num_zeros == layer.num_weights]
        if collapsed:
            logger.warning("No weight is left in %s: consider --exclude or a lower sparsity.", summarize(collapsed, 3))
        self.report = report
        self.progress.pruned()
        return report

    def save_pretrained(
        self, save_directory: str | Path, image_processor: object | None = None, compressed: bool = False
    ) -> None:
        """Save the pruned model with its CAPConfig and report (main process), atomically.

        Args:
            save_directory: replaced as a whole if it exists.
            image_processor: saved beside the model if given.
            compressed: store only what is not zero; then `import cap_hf` is needed before `from_pretrained`.
        """
        if self.accelerator.is_main_process:
            report = self.report.to_dict() if self.report else {}
            save_checkpoint(save_directory, self.model, self.config, report, image_processor, compressed)
        self.accelerator.wait_for_everyone()

    @property
    def _block_size(self) -> int | str:
        return "row" if self.config.method == "sparsegpt" else self.config.fisher_block_size

    def _find_targets(self, block_size: int | str) -> list[Target]:
        config = self.config
        return find_targets(self.model, block_size, config.include, config.exclude, config.pattern)

    def _forget(self) -> None:
        """Begin anew, with nothing collected."""
        if self._temporary is not None:
            self._temporary.cleanup()
        self.fisher, self.plan, self.state, self._spill, self._temporary = None, None, None, None, None
        self._weights: MutableMapping[str, torch.Tensor] = {}
        self._orders: MutableMapping[str, torch.Tensor] = {}
        self._losses: MutableMapping[str, torch.Tensor] = {}

    def _tensors(self, kind: str) -> MutableMapping[str, torch.Tensor]:
        """A dict of tensors; on the disk where the plan spills."""
        if self._spill is None:
            return {}
        return DiskTensors(self._spill / kind, self.accelerator.device)

    def discard_state(self) -> None:
        """Remove what `collect` kept on the disk for a run that goes on: this one is over."""
        if self.state is not None:
            self.state.remove()
            self.state = None

    def _make_plan(self, examples: CalibrationExamples, checkpointing: Checkpointing | None) -> None:
        costs = measure(self.model, examples.peek(), self.targets)
        if self.config.method == "sparsegpt":
            self.plan = Plan([self.targets], "row", costs.samples, costs.samples)
        else:
            self.plan = make_plan(self._find_targets, self._block_size, self.resources, costs, self.processes)
        if checkpointing is not None:
            facts = {f"config {name}": value for name, value in self.config.to_dict().items()}
            facts |= {"model weights": hash_weights(self.model), "number of processes": self.processes.world}
            facts |= {"number of examples": examples.size, "PyTorch": torch.__version__}
            self.state = CollectionState(checkpointing, self.processes, facts, self.plan.to_dict())
            self.plan = self.plan.like(self.state.plan, self._find_targets)
        self.targets = [target for each in self.plan.passes for target in each]
        examples.limit = self.plan.limit
        passes = len(self.plan.passes)
        if passes > 1 and examples.once:
            raise CAPError(f"{passes} passes need the examples again: collect from a DataLoader or a list of batches")
        if self.plan.spilled and self.state is not None:
            self._spill = self.state.folder / "spill"
        elif self.plan.spilled:
            folder = spill_folder(self.resources)
            self._temporary = tempfile.TemporaryDirectory(prefix="cap_hf-", dir=folder, ignore_cleanup_errors=True)
            self._spill = Path(self._temporary.name)
        seconds = costs.seconds * self.config.num_grads * passes / self.processes.world
        if self._spill is not None:
            seconds += disk_seconds(self.plan, self._spill.parent)
        # What is over before a bar would show needs no plan either.
        if seconds > 2 or passes > 1:
            self.progress.say(self.plan.describe(seconds, self._spill))
        self.progress.start(self.targets, costs.work * self.config.num_grads, self.processes.world)

    def _collect_passes(self, examples: CalibrationExamples) -> BlockFisher:
        """The Fisher of all targets, from as many passes over the examples as the plan has."""
        kind = InputHessian if self.config.method == "sparsegpt" else BlockFisher
        passes = self.plan.passes
        dtype, wanted, work = getattr(torch, self.config.fisher_dtype), self.config.num_grads, self.progress.work
        spilled = None
        if self._spill is not None:
            spilled = SpilledSums(self._spill / "sums", self.targets, self.accelerator.device)
        means: dict[str, float] = {}
        count, finished = 0, [] if self.state is None else self.state.passes()
        for number, targets in enumerate(passes):
            name = "collecting" if len(passes) == 1 else f"collecting, pass {number + 1} of {len(passes)}"
            advance = self.progress.phase(name, "gradient", wanted, work / len(passes))
            if number < len(finished):
                means |= finished[number]["means"]
                count = finished[number]["count"]
                advance(count)
                continue
            fisher = kind(targets, self.processes, dtype, self.plan.at_a_time)
            if self.state is None:
                fisher.collect(self.model, examples, advance)
            else:
                rest = self.state.begin_pass(number, fisher, examples)
                advance(fisher.count)
                fisher.collect(self.model, rest, self.state.saving(number, fisher, advance))
            count = fisher.count
            if not count:
                raise CAPError("the dataloader is empty: no example to collect gradients from")
            own = fisher.mean_diagonals()
            means |= own
            if spilled is not None:
                spilled.write(fisher.sums)
                fisher.sums = {}
                if self.state is not None:
                    self.state.finish_pass(number, {"means": own, "count": count})
            elif self.state is not None and kind is BlockFisher:
                # Input Hessians are summed over the processes by now: going on from these would do that twice.
                self.state.save(number, fisher)
        if count < wanted:
            logger.warning(
                "The data ended after %d of %d gradient samples; they are what the Fisher is estimated from.",
                count,
                wanted,
            )
        self._damps = damps(means, self.config.resolved_damp, self.config.absolute_damp)
        if spilled is None:
            return fisher
        whole = kind([], self.processes, dtype)
        whole.targets, whole.sums, whole.count = self.targets, spilled, count
        whole.owned = {
            target.name: block_shares(target, self.processes)[self.processes.rank] for target in self.targets
        }
        return whole

    def _remember_weights(self) -> None:
        self._weights = self._tensors("weights")
        for target in self.targets:
            own = block_shares(target, self.processes)[self.processes.rank]
            self._weights[target.name] = target.to_blocks(target.weight.detach())[own].clone()

    def _check_sparsity(self, sparsity: float | None) -> float:
        if not self._weights:
            if self.config.method != "magnitude":
                raise CAPError("call collect(dataloader) before prune: there is no Fisher yet")
            self._remember_weights()
        pattern = self.config.pattern
        if pattern is not None:
            if sparsity is not None and abs(sparsity - pattern.sparsity) > 1e-9:
                raise CAPError(
                    f"sparsity {sparsity} contradicts {pattern}, which is {pattern.sparsity:g}: leave it out"
                )
            return pattern.sparsity
        if sparsity is None or not 0 <= sparsity < 1:
            raise CAPError(f"sparsity {sparsity} is not in [0, 1)")
        total = sum(target.weight.numel() for target in self.targets)
        own = sum(int((self._weights[target.name] == 0).sum()) for target in self.targets)
        zeros = sum(zeros for (zeros,) in self.processes.gather_ints(own))
        if round(total * sparsity) < zeros:
            raise CAPError(f"the model is {zeros / total:.4%} sparse already: sparsity {sparsity} would be less")
        return sparsity

    def _eliminate(self, solver: Solver) -> None:
        """The order and losses of all removals of this process's blocks."""
        self._orders, self._losses = self._tensors("orders"), self._tensors("losses")
        shares = [block_shares(target, self.processes)[self.processes.rank] for target in self.targets]
        count = sum(share.stop - share.start for share in shares)
        advance = self.progress.phase("eliminating", "block", count)
        for target in self.targets:
            found = solver.eliminate(target, self._weights[target.name], advance)
            self._orders[target.name], self._losses[target.name] = found.order, found.losses
        self._pattern = self.config.pattern

    def _allocate(self, sparsity: float) -> list[torch.Tensor]:
        """How many weights each of this process's blocks gives up, for each target."""
        names = [target.name for target in self.targets]
        if self.config.pattern is not None:
            orders = [self._orders[name] for name in names]
            return [torch.full(order.shape[:1], order.shape[1], device=order.device) for order in orders]
        paths = [
            path_losses(self._losses[name], (self._weights[name] == 0).sum(dim=1), self.config.selection)
            for name in names
        ]
        sizes = [target.weight.numel() for target in self.targets]
        if self.config.allocation == "global":
            return allocate_global(paths, round(sum(sizes) * sparsity), self.processes)
        return allocate_uniform(paths, sizes, sparsity, self.processes)
