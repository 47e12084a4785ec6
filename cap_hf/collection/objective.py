"""Which loss the Fisher is made from: what the config says, or the first that the model and the data allow."""

import logging
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from cap_hf.collection.running import Batch, frozen
from cap_hf.config import FISHER_LOSSES, CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.method.losses import Deviations, FeatureLoss, FisherLoss, LabelLoss, SampledLabelLoss
from cap_hf.outputs import FEATURE_KINDS, logits_of, other_task
from cap_hf.towers import is_classifier, picks_label, prefix_tokens, see

logger = logging.getLogger(__name__)


def choose_loss(wish: str | None, model: nn.Module, batch: Batch | None, processes: Processes) -> str:
    """Return the name of the loss, the same on every process.

    Args:
        wish: what the config says; None for the first that is possible.
        model: on its device.
        batch: of this process, None if it has none.
        processes: of the run.

    Raises:
        CAPError: the loss that is wished for is one of labels, and the model tells no classes apart.
    """
    if wish is not None:
        if batch is not None:
            check_loss(wish, model, batch)
        return wish
    own = -1
    if batch is not None:
        possible = "labels" if "labels" in batch else "sampled"
        own = FISHER_LOSSES.index(possible if has_logits(model, batch) else "features")
    known = [each for (each,) in processes.gather_ints(own) if each >= 0]
    return FISHER_LOSSES[max(known, default=0)]


def check_loss(wish: str, model: nn.Module, batch: Batch) -> None:
    """Raise a CAPError if a loss of labels is wished for, and what a model makes of a batch is no logits of classes."""
    if wish != "features" and not has_logits(model, batch):
        task = other_task(model) if is_classifier(model) else None
        head = "has no such head" if task is None else f"is for {task}"
        raise CAPError(
            f"fisher_loss={wish!r} is for models that tell classes apart, and {type(model).__name__} {head}: "
            "leave it out, or use 'features'"
        )


def has_logits(model: nn.Module, batch: Batch) -> bool:
    """Return whether a model picks one class of several: by its class and config, or by what it makes of an image."""
    if is_classifier(model):
        return picks_label(model)
    device = next(model.parameters()).device
    with frozen(model), torch.no_grad():
        outputs = see(model, {name: value[:1].to(device) for name, value in batch.items()})
    try:
        logits_of(outputs)
    except CAPError:
        return False
    # The tuple of a model of transformers that is no classifier begins with its tokens.
    return not (isinstance(outputs, tuple) and isinstance(model, PreTrainedModel))


def make_loss(config: CAPConfig, model: nn.Module) -> FisherLoss:
    """Return the loss that a config names; one of features still lacks their deviations, see `measure_deviations`."""
    if config.fisher_loss == "features":
        weights = {kind: getattr(config, f"{kind}_weight") for kind in FEATURE_KINDS}
        return FeatureLoss(weights, prefix_tokens(model), config.feature_projections)
    return SampledLabelLoss() if config.fisher_loss == "sampled" else LabelLoss()


def measure_deviations(
    loss: FeatureLoss, model: nn.Module, batches: Iterable[Batch], processes: Processes, disable_tqdm: bool
) -> None:
    """Take examples through the model once, forward, and give the loss the deviations of its features.

    Raises:
        CAPError: no example is there, the model returns no features, or they are not finite.
    """
    found = Deviations()
    batches = transformers_logging.tqdm(batches, desc="Measuring features", delay=2, disable=disable_tqdm)
    with frozen(model), torch.no_grad():
        for batch in batches:
            found.add(loss.features(see(model, batch)))
    # A process without examples learns from the others what there is to add up.
    shapes = processes.share_first({name: each.shape[1] for name, each in found.moments.items()})
    if not shapes:
        raise CAPError("the dataloader is empty: no example to collect gradients from")
    for name, channels in shapes.items():
        own = found.moments.get(name, torch.zeros(3, channels, dtype=torch.float64, device=processes.device))
        found.moments[name] = processes.sum(own)
    loss.deviations = found.finish()
    broken = [name for name, each in loss.deviations.items() if not each.isfinite().all()]
    if broken:
        raise CAPError(
            f"the model's {broken[0]} features are NaN or infinite: check its weights and its dtype (load it in "
            "float32) and the pixel values"
        )
    constant = [name for name, each in loss.deviations.items() if not each.any()]
    if constant:
        logger.warning("The %s features are the same for all examples: they do not count.", ", ".join(constant))
