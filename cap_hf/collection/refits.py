"""The refit of a model that was pruned, from a dataloader, all or nothing."""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from cap_hf.checkpoints.form import round_weights
from cap_hf.collection.examples import first_examples
from cap_hf.collection.precision import check_precision
from cap_hf.collection.progress import Progress
from cap_hf.collection.refitting import parameters_of, refit, work_of
from cap_hf.collection.removal_paths import RemovalPaths
from cap_hf.collection.resources import Resources
from cap_hf.collection.running import Batches, unchanged_on_error
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.report import RefitReport
from cap_hf.targets import Target


class Pruned(Protocol):
    """What a refit asks of a `CAPCompressor`."""

    model: PreTrainedModel
    config: CAPConfig
    targets: list[Target]
    processes: Processes
    resources: Resources
    progress: Progress
    dtype: torch.dtype | None


def refit_pruned(compressor: Pruned, paths: RemovalPaths, dataloader: Batches) -> RefitReport:
    """Refit what is left of a compressor's model, rounded to what it will be stored in; errors leave it as it was.

    Args:
        compressor: whose model was pruned.
        paths: of the model, which know its dense layers, and what earlier refits have found out about it.
        dataloader: as `CAPCompressor.collect` takes it, without labels.

    Returns:
        What was done.

    Raises:
        CAPError: as of `CAPCompressor.refit`.
    """
    model, config, targets, processes = compressor.model, compressor.config, compressor.targets, compressor.processes
    check_precision(targets, processes.device)
    model.to(processes.device)  # type: ignore[arg-type]  # as PyTorch's own
    batches = first_examples(dataloader, config.refit_examples, config, processes, model)
    advance = compressor.progress.phase("refitting", "layer", sum(map(work_of, targets)))
    with unchanged_on_error(parameters_of(targets)):
        how = (config, processes, advance, compressor.resources, paths.relevance)
        done = refit(model, targets, paths.dense_layer, batches, *how)
        round_weights(model, compressor.dtype)
    return done
