"""One pruning step of a gradual run: a fresh Fisher of the model as it is, then CAP."""

from dataclasses import dataclass

import datasets
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel

from cap_hf.collection.examples import whole_groups
from cap_hf.collection.resources import Resources
from cap_hf.compressor import CAPCompressor
from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import ImageDataset, calibration_split, make_dataloader
from cap_hf.errors import CAPError
from cap_hf.masks import count_zeros
from cap_hf.patterns import unit_of
from cap_hf.recovery.schedules import SparsitySchedule
from cap_hf.report import PruneReport
from cap_hf.targets import find_targets
from cap_hf.towers import image_shape, picks_label, vision_config


@dataclass
class GradualPruner:
    """What `SparseTrainer` calls for a pruning step.

    Attributes:
        dataloader: calibration examples in a fixed order, so that a step repeated after a crash prunes the same.
        config: how to prune.
        disable_tqdm: no progress bars.
        resources: memory and passes of a step; `Resources()` if None.
    """

    dataloader: DataLoader
    config: CAPConfig
    disable_tqdm: bool = False
    resources: Resources | None = None

    @classmethod
    def from_split(
        cls,
        split: datasets.Dataset,
        image_processor: BaseImageProcessor,
        model: PreTrainedModel,
        data_args: DataArguments,
        config: CAPConfig,
        batch_size: int,
        disable_tqdm: bool = False,
        resources: Resources | None = None,
        device: torch.device | None = None,
    ) -> "GradualPruner":
        """Return a pruner on a calibration set that the config's seed fixes.

        Args:
            split: what the calibration examples are drawn from.
            image_processor: the model's.
            model: for its labels and number of channels.
            data_args: names of the columns, and how many processes load images.
            config: how to prune.
            batch_size: examples that are loaded together; made a multiple of `config.samples_per_grad`.
            disable_tqdm: no progress bars.
            resources: memory and passes of a step.
            device: that the model will be trained on; None for where it is.
        """
        examples = calibration_split(split, config.num_grads * config.samples_per_grad, config.seed)
        shown = vision_config(model) or model.config
        dataset = ImageDataset(examples, image_processor, shown, data_args, picks_label(model), image_shape(model)[0])
        if config.fisher_loss == "labels":
            dataset.need_labels()
        loader = make_dataloader(
            dataset, whole_groups(batch_size, config), data_args.dataloader_num_workers, device or model.device
        )
        return cls(loader, config, disable_tqdm, resources)

    def check(self, model: nn.Module, schedule: SparsitySchedule) -> None:
        """Raise a CAPError if the model cannot be pruned on this schedule, before anything is trained.

        A sparsity of the schedule is a share of the weights that `config` prunes, as it is for `CAPCompressor.prune`.
        """
        config, pattern = self.config, self.config.nm
        targets = find_targets(model, include=config.include, exclude=config.exclude, pattern=config.structure)
        if pattern is not None:
            for _, sparsity in schedule.steps:
                try:
                    pattern.check_sparsity(sparsity)
                except CAPError as error:
                    only = f"--allocation {pattern} goes with --sparsity_schedule {pattern.sparsity:.10g} alone"
                    raise CAPError(f"{only}: {error}") from error
        schedule.check_start(*count_zeros(targets, unit_of(config.structure)))

    def __call__(self, model: PreTrainedModel, sparsity: float, accelerator: Accelerator) -> PruneReport:
        """Prune the model in place.

        Raises:
            CAPError: as `CAPCompressor.collect` and `prune`.
        """
        compressor = CAPCompressor(model, self.config, accelerator, self.disable_tqdm, self.resources)
        return compressor.collect(self.dataloader).prune(sparsity)
