"""CAPCompressor: collect once, prune to any sparsity, save."""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from cap_hf.allocation import allocate_global, allocate_uniform, path_losses, removed_mask
from cap_hf.baselines import InputHessian, rank_scores
from cap_hf.checkpoint import save_checkpoint
from cap_hf.config import CAPConfig, NMPattern
from cap_hf.elimination import (
    Elimination,
    LostPivotError,
    NotInvertibleError,
    decouple,
    eliminate,
    independent_update,
    invert,
    reconstruct,
)
from cap_hf.errors import CAPError
from cap_hf.fisher import Batch, BlockFisher
from cap_hf.report import LayerReport, PruneReport
from cap_hf.targets import Target, find_targets, summarize

logger = logging.getLogger(__name__)

# Bytes of float64 matrices that are solved at a time.
CHUNK_BYTES = 64 * 2**20


class CAPCompressor:
    """Prunes a transformers image classifier with the Correlation-Aware Pruner (arXiv 2210.09223).

    Args:
        model: in float32 or float64 (half precision loses the gradients of single examples).
        config: how to prune; `CAPConfig()` if None.
        accelerator: from accelerate; with several processes each takes its share of the examples.
        disable_tqdm: no progress bars.

    Raises:
        CAPError: the model has no targets, or the config does not fit them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: CAPConfig | None = None,
        accelerator: Accelerator | None = None,
        disable_tqdm: bool = False,
    ) -> None:
        self.model = model
        self.config = config or CAPConfig()
        self.accelerator = accelerator or Accelerator()
        self.disable_tqdm = disable_tqdm or not self.accelerator.is_main_process
        block_size = "row" if self.config.method == "sparsegpt" else self.config.fisher_block_size
        self.targets = find_targets(model, block_size, self.config.include, self.config.exclude, self.config.pattern)
        self.fisher: BlockFisher | None = None
        self.report: PruneReport | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._eliminations: dict[str, Elimination] = {}
        self._pattern: NMPattern | None = None
        self._damps: dict[str, float] = {}

    def collect(self, dataloader: DataLoader | Iterable[Batch]) -> "CAPCompressor":
        """Estimate the Fisher once, from `num_grads * samples_per_grad` examples, and remember the weights.

        Args:
            dataloader: batches of `pixel_values` and `labels`. A DataLoader, not prepared by accelerate, is
                shared out between the processes; any other iterable holds this process's own share. The batch
                size must be a multiple of `samples_per_grad`.

        Returns:
            self, ready for any number of `prune`.

        Raises:
            CAPError: there is too little memory, no data, a batch that does not fit, or a gradient that is not
                finite.
        """
        if self.config.method == "magnitude":
            self._remember_weights()
            return self
        if self.model.dtype in (torch.float16, torch.bfloat16):
            raise CAPError(f"the model is in {self.model.dtype}: load it in float32 to collect gradients")
        if self.accelerator.device.type == "mps":
            raise CAPError("Apple's MPS has no float64, which the solver needs: set ACCELERATE_USE_CPU=true")
        self._check_memory()
        self.fisher, self._weights, self._eliminations = None, {}, {}
        self.model.to(self.accelerator.device)
        fisher = (InputHessian if self.config.method == "sparsegpt" else BlockFisher)(self.targets)
        training = self.model.training
        self.model.eval()
        try:
            fisher.collect(self.model, self._batches(dataloader))
        finally:
            self.model.train(training)
        fisher.reduce(self.accelerator)
        if not fisher.count:
            raise CAPError("the dataloader is empty: no example to collect gradients from")
        if fisher.count < self.config.num_grads:
            logger.warning(
                "The data ended after %d of %d gradient samples; they are what the Fisher is estimated from.",
                fisher.count,
                self.config.num_grads,
            )
        self._damps = fisher.damps(self.config.resolved_damp, self.config.absolute_damp)
        self.fisher = fisher
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
        if not self._eliminations or self._pattern != self.config.pattern:
            self._solve()
        counts = self._allocate(sparsity)
        report = PruneReport(self.config.method, self.config.allocation, self.config.selection, sparsity)
        pruned = {}
        for target, count in self._progress(list(zip(self.targets, counts, strict=True)), "Reconstructing"):
            pruned[target.name], loss = self._reconstruct(target, count)
            zeros = int((pruned[target.name] == 0).sum())
            report.layers.append(
                LayerReport(
                    target.name, tuple(target.weight.shape), target.block_size, target.weight.numel(), zeros, loss
                )
            )
        # Nothing is changed before everything is solved.
        for target in self.targets:
            weight = target.from_blocks(pruned[target.name]).to(target.weight)
            target.weight.data.copy_(broadcast(weight) if self.accelerator.num_processes > 1 else weight)
        collapsed = [layer.name for layer in report.layers if layer.num_zeros == layer.num_weights]
        if collapsed:
            logger.warning("No weight is left in %s: consider --exclude or a lower sparsity.", summarize(collapsed, 3))
        self.report = report
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

    def _batches(self, dataloader: Iterable[Batch]) -> Iterator[tuple[Batch, int, torch.Tensor | None]]:
        """This process's batches, cut to the examples asked for, as `BlockFisher.collect` takes them."""
        group, world = self.config.samples_per_grad, self.accelerator.num_processes
        wanted = self.config.num_grads * group
        uniforms = None
        if self.config.fisher_type == "sampled":
            # Drawn for all examples at once: an example gets the same label on whatever process it lands.
            uniforms = torch.rand(wanted, generator=torch.Generator().manual_seed(self.config.seed))
        rank, size = self.accelerator.process_index, None
        if isinstance(dataloader, DataLoader):
            size = getattr(dataloader.batch_sampler, "batch_size", None)
            if size is None and world > 1:
                raise CAPError("several processes share batches of one size: give the dataloader a batch_size")
            # Even shares would repeat examples, and the Fisher would count them twice.
            dataloader = prepare_data_loader(
                dataloader,
                num_processes=world,
                process_index=rank,
                put_on_device=False,
                even_batches=False,
                rng_types=["generator"],
            )
        else:
            rank, world = 0, 1
        progress = transformers_logging.tqdm(
            total=-(-wanted // world), desc="Collecting", unit="example", delay=2, disable=self.disable_tqdm
        )
        seen = 0
        with progress:
            for index, batch in enumerate(dataloader):
                if "labels" not in batch or "pixel_values" not in batch:
                    raise CAPError(f"a batch has {sorted(batch)}; it needs pixel_values and labels")
                full = size or len(batch["labels"])
                if full % group:
                    raise CAPError(f"the batch size {full} is not a multiple of samples_per_grad={group}")
                # Where this batch's examples stand among those of all processes.
                start = (index * world + rank) * size if world > 1 else seen
                seen += len(batch["labels"])
                length = min(len(batch["labels"]), wanted - start) // group * group
                if length <= 0:
                    break
                batch = {name: value[:length].to(self.accelerator.device) for name, value in batch.items()}
                yield batch, length // group, None if uniforms is None else uniforms[start : start + length]
                progress.update(length)

    def _remember_weights(self) -> None:
        self._weights = {target.name: target.to_blocks(target.weight.detach()).clone() for target in self.targets}
        self._eliminations = {}

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
        total = sum(weights.numel() for weights in self._weights.values())
        zeros = sum(int((weights == 0).sum()) for weights in self._weights.values())
        if round(total * sparsity) < zeros:
            raise CAPError(f"the model is {zeros / total:.4%} sparse already: sparsity {sparsity} would be less")
        return sparsity

    def _allocate(self, sparsity: float) -> list[torch.Tensor]:
        """How many weights each block of each target gives up."""
        eliminations = [self._eliminations[target.name] for target in self.targets]
        if self.config.pattern is not None:
            return [torch.full_like(each.order[:, 0], each.order.shape[1]) for each in eliminations]
        paths = [
            path_losses(each.losses, (self._weights[target.name] == 0).sum(dim=1), self.config.selection)
            for target, each in zip(self.targets, eliminations, strict=True)
        ]
        sizes = [target.weight.numel() for target in self.targets]
        if self.config.allocation == "global":
            return allocate_global(paths, round(sum(sizes) * sparsity))
        return allocate_uniform(paths, sizes, sparsity)

    def _solve(self) -> None:
        """The order and losses of all removals of all blocks."""
        chunks = [(target, blocks) for target in self.targets for blocks in self._chunks(target)]
        parts: dict[str, list[Elimination]] = {}
        for target, blocks in self._progress(chunks, "Eliminating"):
            try:
                part = self._eliminate(target, blocks)
            except LostPivotError as error:
                raise CAPError(
                    f"rounding destroyed a pivot of {target.name} (block {blocks.start + error.block}): "
                    f"raise the damp, now {self.config.resolved_damp:g}"
                ) from error
            parts.setdefault(target.name, []).append(Elimination(part.order.int(), part.losses.float()))
        self._eliminations = {
            name: Elimination(torch.cat([p.order for p in each]), torch.cat([p.losses for p in each]))
            for name, each in parts.items()
        }
        self._pattern = self.config.pattern

    def _eliminate(self, target: Target, blocks: slice) -> Elimination:
        weights = self._weights[target.name][blocks].double()
        pattern = self.config.pattern
        if self.config.method == "magnitude":
            return rank_scores(weights.square(), pattern)
        inverse = self._invert(target, blocks, weights == 0)
        if self.config.method == "obs":
            scores = weights.square() / inverse.diagonal(dim1=-2, dim2=-1) / 2
            return rank_scores(scores.masked_fill(weights == 0, -1.0), pattern)
        return eliminate(weights, inverse, pattern)

    def _invert(self, target: Target, blocks: slice | torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The inverse damped Fisher of blocks whose weights marked by `zero` `(n, B)` stay 0."""
        try:
            return invert(decouple(self.fisher.damped(target, blocks, self._damps[target.name]), zero))
        except NotInvertibleError as error:
            enough = self._damps[target.name] + error.damp
            number = int(torch.arange(target.num_blocks)[blocks][error.block])
            if not self.config.absolute_damp:
                enough *= self.config.resolved_damp / self._damps[target.name]
            raise CAPError(
                f"the Fisher of {target.name} (block {number}) cannot be inverted with "
                f"damp={self.config.resolved_damp:g}: --damp {enough:.1e} would do"
            ) from error

    def _reconstruct(self, target: Target, counts: torch.Tensor) -> tuple[torch.Tensor, float | None]:
        """The new weights `(num_blocks, B)` of a target whose blocks give up `counts` weights, and their loss."""
        weights = self._weights[target.name]
        removed = removed_mask(self._eliminations[target.name].order.long(), counts, target.block_size)
        keep = ~removed & (weights != 0)
        if self.config.method == "magnitude":
            return weights.masked_fill(~keep, 0.0), None
        # Blocks with as many survivors are solved together.
        by_count = keep.sum(dim=1).argsort()
        pruned, loss = torch.empty_like(weights), 0.0
        for chunk in self._chunks(target):
            blocks = by_count[chunk]
            old = weights[blocks].double()
            fisher = self.fisher.damped(target, blocks, self._damps[target.name])
            if self.config.weight_update == "joint":
                new = reconstruct(old, fisher, keep[blocks])
            elif self.config.weight_update == "independent":
                new = independent_update(old, self._invert(target, blocks, old == 0), keep[blocks])
            else:
                new = old.masked_fill(~keep[blocks], 0.0)
            pruned[blocks] = new.to(pruned.dtype)
            change = (new - old)[..., None]
            loss += float((change * fisher.bmm(change)).sum() - self._damps[target.name] * change.square().sum()) / 2
        return pruned, loss

    def _chunks(self, target: Target) -> Iterator[slice]:
        step = max(1, CHUNK_BYTES // (8 * target.block_size**2))
        for start in range(0, target.num_blocks, step):
            yield slice(start, min(start + step, target.num_blocks))

    def _progress(self, items: list, description: str) -> Iterable:
        return transformers_logging.tqdm(items, desc=description, delay=2, disable=self.disable_tqdm)

    def _check_memory(self) -> None:
        """Raise a CAPError that names a block size that fits, before memory runs out."""
        device = self.accelerator.device
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        needed = self._fisher_bytes(self.targets)
        if needed <= free or self.config.method == "sparsegpt":
            return
        config = self.config
        for size in (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 64, 32, 16):
            fitted = find_targets(self.model, size, config.include, config.exclude, config.pattern)
            if self._fisher_bytes(fitted) <= free:
                advice = f"--fisher_block_size {size} would do"
                break
        else:
            advice = "prune fewer targets at a time with --include"
        raise CAPError(
            f"the Fisher with fisher_block_size={config.fisher_block_size} takes {needed / 2**30:.1f} GiB of the "
            f"{free / 2**30:.1f} GiB that are free: {advice}"
        )

    @staticmethod
    def _fisher_bytes(targets: list[Target]) -> int:
        """Bytes of the block Fishers, and of what is solved at a time beside them."""
        return sum(4 * target.weight.numel() * target.block_size for target in targets) + 8 * CHUNK_BYTES
