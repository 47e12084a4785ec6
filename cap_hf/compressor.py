"""CAPCompressor: collect once, prune to any sparsity, save."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import BaseImageProcessor, PreTrainedModel

from cap_hf.budget import Budget
from cap_hf.checkpoints.form import StoredForm, round_weights
from cap_hf.checkpoints.saving import check_shared, save_checkpoint
from cap_hf.collection import searching
from cap_hf.collection.batch_norm import NUM_EXAMPLES, recalibrate_batch_norm, statistics_of
from cap_hf.collection.budgets import Budgets
from cap_hf.collection.collection import Collection
from cap_hf.collection.examples import first_examples
from cap_hf.collection.forecast import Forecast, check_forecast
from cap_hf.collection.forecasting import forecasts
from cap_hf.collection.hardware import Hardware
from cap_hf.collection.plan import Plan
from cap_hf.collection.progress import Progress
from cap_hf.collection.pruning import eliminate, solve_each, write_pruned
from cap_hf.collection.refits import refit_pruned
from cap_hf.collection.removal_paths import RemovalPaths, with_changes
from cap_hf.collection.reporting import report_pruning, report_refit
from cap_hf.collection.resources import Afterwards, Resources
from cap_hf.collection.running import Batches, differentiable, unchanged_on_error
from cap_hf.collection.solver import Solver
from cap_hf.collection.state import Checkpointing
from cap_hf.config import CAPConfig, check_type
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.method.fisher import BlockFisher
from cap_hf.method.methods import METHODS
from cap_hf.models import usable, usable_of_transformers
from cap_hf.report import PruneReport
from cap_hf.targets import find_targets


class CAPCompressor:
    """Prunes a transformers vision model with the Correlation-Aware Pruner (arXiv 2210.09223).

    Args:
        model: an image classifier, a backbone without a head, or a model with a vision tower, which alone is pruned; in
            float32 or float64 (half precision loses the gradients of single examples). What wraps it (`torch.compile`,
            DataParallel, DDP) is left off.
        config: how to prune; `CAPConfig()` if None.
        accelerator: from accelerate; with several processes each takes its share of the examples and of the blocks.
        disable_tqdm: no progress bar.
        resources: memory, passes and disk; `Resources()` if None.
        prunes: how many sparsities will be pruned to; the plan, and the time left that the bar shows, go by it.
        dtype: that the model will be saved in, such as bfloat16: `prune` rounds to what it holds, and counts what
            is too small for it as zeros. None for the model's own.
        refits: leave memory for a `refit` after each prune.

    Attributes:
        targets: what is pruned.
        config: how the model was pruned last, or will be.
        report: of the last `prune`.

    Raises:
        CAPError: the model cannot be used (see `cap_hf.models.usable`), or has no targets that the config fits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: CAPConfig | None = None,
        accelerator: Accelerator | None = None,
        disable_tqdm: bool = False,
        resources: Resources | None = None,
        prunes: int = 1,
        dtype: torch.dtype | None = None,
        refits: bool = False,
    ) -> None:
        self.model: PreTrainedModel = usable(model)
        if isinstance(self.model, PreTrainedModel):
            # What could not be saved in the end is said before the work.
            check_shared(self.model)
        check_type("config", config, CAPConfig, "pass CAPConfig(method='cap'), or CAPConfig(**fields)")
        check_type("resources", resources, Resources, "pass Resources(max_memory='8GB')")
        check_type("dtype", dtype, torch.dtype, "pass such as torch.bfloat16")
        self.config = config or CAPConfig()
        self.accelerator = accelerator or Accelerator()
        self.resources, self.afterwards, self.dtype = resources or Resources(), Afterwards(prunes, refits), dtype
        self.processes = Processes(self.accelerator)
        self.progress = Progress(disable_tqdm or not self.accelerator.is_main_process)
        # Not a method: a collection that holds its compressor would outlive it, and so would what it has spilled.
        own = self.config
        self._find = partial(find_targets, self.model, include=own.include, exclude=own.exclude, pattern=own.structure)
        block_size = METHODS[self.config.method].block_size(self.config)
        self.targets = self._find("row" if block_size == "auto" else block_size)
        self.budgets = Budgets(self.model, self.processes, self.progress, dtype)
        self.report: PruneReport | None = None
        self.collection: Collection | None = None
        self.paths: RemovalPaths | None = None

    @property
    def fisher(self) -> BlockFisher | None:
        """Return the Fisher of this process's blocks, after `collect`."""
        return None if self.paths is None else self.paths.solver.fisher

    @property
    def plan(self) -> Plan | None:
        """Return how the collection went through memory."""
        return None if self.collection is None else self.collection.plan

    def collect(self, dataloader: Batches, checkpointing: Checkpointing | None = None) -> "CAPCompressor":
        """Estimate the Fisher once, from `num_grads * samples_per_grad` examples, and remember the weights.

        What does not fit into memory is collected in several passes over the examples, and kept on the disk or
        collected anew for the weights, whichever takes less time; a line says so.

        Args:
            dataloader: batches of `pixel_values`, and of `labels` for `fisher_loss="labels"`. A DataLoader, not
                prepared by accelerate, is shared out between the processes; any other iterable holds this process's
                own share. The batch size must be a multiple of `samples_per_grad`.
            checkpointing: keep the state on the disk so that a run that was killed can go on; what it leaves is
                removed by `discard_state`.

        Returns:
            self, ready for any number of `prune`.

        Raises:
            CAPError: there is too little memory, no data, a batch that does not fit, or a gradient that is not finite.
        """
        check_type("checkpointing", checkpointing, Checkpointing, "pass Checkpointing(folder, 128)")
        if self.collection is not None:
            self.collection.close()
        self.collection, self.paths, self.report = None, None, None
        with differentiable(self.model):
            self.model.to(self.accelerator.device)
            statistics = statistics_of(self.model)
            if METHODS[self.config.method].statistic is None:
                solver = Solver(self.config, None)
                self.paths = RemovalPaths(self.targets, solver, self.processes, statistics=statistics)
                return self
            self.collection = collection = self._collection(dataloader)
            self.config = collection.config
            solver = Solver(self.config, collection.run(checkpointing), collection.batch_bytes)
            self.targets, again = collection.targets, collection.recollection
            paths = RemovalPaths(self.targets, solver, self.processes, collection.tensors, statistics, again)
            if again:
                eliminate(paths, self.config.structure, self.progress)
            self.paths = paths
            return self

    def check_sparsity(self, sparsity: float | Budget | None = None) -> None:
        """Raise the CAPError of `prune` about a sparsity that the model, as it is, cannot be pruned to; any time."""
        self.budgets.check(sparsity, self.config, self.targets)

    def _collection(self, dataloader: Batches) -> Collection:
        how = (self.config, self._find, self.processes, self.resources, self.progress, self.afterwards)
        return Collection(self.model, dataloader, *how)

    def forecast(
        self, dataloader: Batches, processes: Sequence[int] = (1, 2, 4, 8), hardware: Hardware | None = None
    ) -> list[Forecast]:
        """Return what `collect` and all that is to come after it would take in so many processes; the model stays.

        Args:
            dataloader: as `collect` takes it; its first batch goes through the model.
            processes: numbers of them, each with the memory and the speed of this one.
            hardware: a GPU for each of them, on paper; sums go to no disk then.

        Returns:
            For each its `plan`, its `seconds` by kind of phase, and the `problem` where nothing fits.

        Raises:
            CAPError: as of `collect`, of what the first batch shows.
        """
        check_forecast(dataloader, processes, hardware, self.config.method)
        self.model.to(self.accelerator.device)
        with differentiable(self.model):
            return forecasts(self._collection(dataloader), processes, hardware)

    def prune(
        self, sparsity: float | Budget | None = None, allocation: str | None = None, selection: str | None = None
    ) -> PruneReport:
        """Prune the model in place, from the weights it had at `collect`, to this sparsity, exact to the unit.

        Args:
            sparsity: share of all target weights that are 0 afterwards, in [0, 1), or a `Budget`; None for N:M.
            allocation: in place of the config's, which then becomes what `self.config` says.
            selection: in place of the config's, likewise.

        Returns:
            What was removed where, as `self.report`.

        Raises:
            CAPError: the sparsity is out of range, below the model's, or not the N:M pattern's; the budget cannot be
                met; no `collect`; a block Fisher cannot be inverted; a weight is too large for the dtype.
        """
        return next(self.prune_each([sparsity], allocation, selection))

    def prune_each(
        self, sparsities: Sequence[float | Budget | None], allocation: str | None = None, selection: str | None = None
    ) -> Iterator[PruneReport]:
        """Prune the model as `prune` does, to one sparsity after the other, and yield the report of each.

        As many as memory has room for are solved for together, which is faster. In between the model may learn.
        """
        paths, config = self._collected_paths(), with_changes(self.config, allocation, selection)
        how = (self.progress, self.collection, self.budgets)
        for amount, pruned, losses in solve_each(paths, config, sparsities, *how):
            write_pruned(self.model, paths, pruned, self.dtype)
            known = [None] * len(self.targets) if self.fisher is None else losses.tolist()
            self.report, self.config = report_pruning(self.targets, config, amount, known, self.budgets), config
            yield self.report

    def refit(self, dataloader: Batches) -> PruneReport:
        """Refit the weights that `prune` has left, and biases, to what the layers made at `collect`, in place.

        Layer by layer in the order of the forward pass, by least squares with a ridge (see `cap_hf.method.refit`), and
        before batch norm is estimated anew. The next `prune` begins with the weights and biases of `collect` again.

        Args:
            dataloader: as `collect` takes it, without labels; its first `refit_examples`, as many as memory holds.

        Returns:
            The report of `prune`, which says of the refit too; its losses stay those of the pruning.

        Raises:
            CAPError: nothing was pruned, there is no example, a layer mixes examples, what reaches one is not finite,
                or a weight is too large for the dtype; the model is what it was then.
        """
        if self.paths is None or self.report is None:
            raise CAPError("call prune(sparsity) before refit: nothing has been pruned yet")
        done = refit_pruned(self, self.paths, dataloader)
        report_refit(self.report, self.targets, done, self.dtype)
        self.progress.end_phase()
        return self.report

    find_sparsity = searching.find_sparsity

    def recalibrate_batch_norm(self, dataloader: Batches, num_examples: int = NUM_EXAMPLES) -> list[str]:
        """Estimate the statistics of all batch norm layers anew, for the weights as they are after `prune`.

        Args:
            dataloader: as `collect` takes it; labels are not needed.
            num_examples: from its beginning, more where else a process would have none; all in memory at once.

        Returns:
            The names of the layers.

        Raises:
            CAPError: the model has no batch norm, there are too few examples, or what reaches a layer is not finite.
        """
        self.model.to(self.accelerator.device)
        batches = first_examples(dataloader, num_examples, self.config, self.processes, self.model)
        with unchanged_on_error(statistics_of(self.model)):
            names = recalibrate_batch_norm(self.model, [batch for batch, _ in batches], self.processes)
            round_weights(self.model, self.dtype)
        return names

    def save_pretrained(
        self,
        save_directory: str | Path,
        image_processor: BaseImageProcessor | None = None,
        compressed: bool | str = False,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Save the pruned model with its CAPConfig and report (main process), atomically.

        Args:
            save_directory: replaced as a whole if it is empty or holds a checkpoint and nothing else.
            image_processor: saved beside the model if given.
            compressed: store only what is non-zero, rounded if 'int8'; `from_pretrained` needs `import cap_hf` before.
            max_shard_size: of the tensors in one file, such as "5GB"; None for transformers' default.

        Raises:
            CAPError: there is too little space, the folder cannot be written, something in it would be lost, or the
                model is none of transformers.
        """
        usable_of_transformers(self.model)
        if self.accelerator.is_main_process:
            report, form = self.report.to_dict() if self.report else {}, StoredForm(self.dtype, max_shard_size)
            save_checkpoint(save_directory, self.model, self.config, report, image_processor, compressed, form=form)
        self.accelerator.wait_for_everyone()

    def discard_state(self) -> None:
        """Remove what `collect` kept on the disk for a run that goes on: this one is over, and prunes no more."""
        if self.collection is not None and self.collection.state is not None:
            self.collection.discard_state()
            self.paths = None

    def _collected_paths(self) -> RemovalPaths:
        """Return what `collect` has left; a method that needs no examples collects now if it has not."""
        if self.paths is None and METHODS[self.config.method].statistic is None:
            self.collect([])
        if self.paths is None:
            raise CAPError("call collect(dataloader) before prune: there is no Fisher yet")
        return self.paths
