"""How `cap-hf prune` measures the models of a search, on train images that are held out for it."""

from collections.abc import Callable
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import PreTrainedModel

from cap_hf.commands.common import image_dataset
from cap_hf.data.arguments import DataArguments
from cap_hf.data.evaluation import score_all
from cap_hf.data.features import extract_features
from cap_hf.data.images import make_dataloader
from cap_hf.data.probes import NEIGHBOURS, nearest_neighbours
from cap_hf.errors import CAPError
from cap_hf.outputs import check_task
from cap_hf.report import Evaluated, SearchReport
from cap_hf.towers import is_classifier

# Fewer images say nothing of the drops that one asks for.
LEAST_IMAGES = 100
# What is lost, for lines that are read.
LOSSES = {"top1": "of top-1", "loss": "nats of loss", "knn": "of k-NN top-1", "cosine": "of cosine"}


def hold_out(
    split: datasets.Dataset, calibration: int, count: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return train images to search with, and all others.

    Args:
        split: to train on.
        calibration: how many of it `calibration_split` takes; none of them is held out.
        count: how many to hold out, where there are as many.
        seed: of the run.

    Returns:
        What is held out; and the others, those that are no calibration examples first.

    Raises:
        CAPError: too few are left beside the calibration examples.
    """
    order, total = split.shuffle(seed=seed), len(split)
    calibration = min(calibration, total)
    count = min(count, total - calibration)
    if count < LEAST_IMAGES:
        raise CAPError(
            f"beside {calibration} calibration examples {count} train images are left to search with, of the "
            f"{LEAST_IMAGES} that are needed: lower --num_grads or --refit_examples, raise --max_search_samples, or "
            "give more images"
        )
    held = order.select(range(calibration, calibration + count))
    return held, order.select([*range(calibration + count, total), *range(calibration)])


def choose_metric(asked: str | None, model: PreTrainedModel, labelled: bool, bank_size: int) -> str:
    """Return what a drop is measured in: what was asked for, or what model and data allow.

    Args:
        asked: as `SearchArguments.max_drop_metric`.
        model: that is pruned.
        labelled: whether its images have labels.
        bank_size: of images whose labels k-NN knows.

    Raises:
        CAPError: model or data do not have what was asked for.
    """
    if asked is None:
        if not labelled:
            return "cosine"
        if is_classifier(model):
            return "top1"
        return "knn" if bank_size >= NEIGHBOURS else "cosine"
    if asked in ("top1", "loss"):
        if not is_classifier(model):
            raise CAPError(
                f"max_drop_metric={asked} needs a head, and {type(model).__name__} has none: take knn or cosine"
            )
        check_task(model, f"max_drop_metric={asked} is", "take cosine")
    if asked != "cosine" and not labelled:
        raise CAPError(f"max_drop_metric={asked} needs images with labels, and these have none: take cosine")
    if asked == "knn" and bank_size < NEIGHBOURS:
        raise CAPError(
            f"max_drop_metric=knn asks the nearest {NEIGHBOURS} of {bank_size} train images: raise --knn_bank_size, "
            "give more train images, or take cosine"
        )
    return asked


class HeldOut:
    """Scores models on the images that are held out, each of them; higher is better.

    Args:
        asked: as `SearchArguments.max_drop_metric`.
        model: dense.
        held: images to score on.
        others: that k-NN may know, those that it takes first.
        bank_size: how many of them it takes.
        image_processor: the model's.
        data_args: which data it is.
        batch_size: examples per step and process.
        accelerator: from accelerate.
        disable_tqdm: no progress bars.

    Attributes:
        metric: what is scored: hits of `top1` or `knn`, the negative `loss`, the `cosine` to the first model scored.

    Raises:
        CAPError: as of `choose_metric` and `ImageDataset`.
    """

    def __init__(
        self,
        asked: str | None,
        model: PreTrainedModel,
        held: datasets.Dataset,
        others: datasets.Dataset,
        bank_size: int,
        image_processor: Any,
        data_args: DataArguments,
        batch_size: int,
        accelerator: Accelerator,
        disable_tqdm: bool = False,
    ) -> None:
        def loader(split: datasets.Dataset) -> Any:
            dataset = image_dataset(split, image_processor, model, data_args)
            return make_dataloader(dataset, batch_size, data_args.dataloader_num_workers, accelerator.device)

        bank_size = min(bank_size, len(others))
        self.images, self.bank = loader(held), None
        self.metric = choose_metric(asked, model, self.images.dataset.labelled, bank_size)
        if self.metric == "knn":
            self.bank = loader(others.select(range(bank_size)))
        self.accelerator, self.disable_tqdm = accelerator, disable_tqdm
        self._dense: torch.Tensor | None = None

    @property
    def num_read(self) -> int:
        """Return how many images go through a model that is scored."""
        return len(self.images.dataset) + (0 if self.bank is None else len(self.bank.dataset))

    def __call__(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the score of each image, `(n,)`, in their order, the same on every process.

        Raises:
            CAPError: as of `score_all` and `extract_features`.
        """
        how = (self.accelerator, self.disable_tqdm)
        if self.metric in ("top1", "loss"):
            scores = score_all(model, self.accelerator.prepare_data_loader(self.images), *how)[self.metric]
            return -scores if self.metric == "loss" else scores
        found = extract_features(model, self.images, *how)
        if self.bank is not None:
            known = extract_features(model, self.bank, *how)
            assert known.labels is not None
            assert found.labels is not None
            return nearest_neighbours(known.descriptors, known.labels, found.descriptors) == found.labels
        if self._dense is None:
            self._dense = found.descriptors
        return F.cosine_similarity(found.descriptors.double(), self._dense.double(), dim=1)


def teller(metric: str, max_evaluations: int) -> Callable[[Evaluated], None]:
    """Return what prints one line for each model of a search that is measured."""
    count = 0

    def tell(evaluated: Evaluated) -> None:
        nonlocal count
        count += 1
        verdict = "kept" if evaluated.kept else "too much"
        print(
            f"search {count} of at most {max_evaluations}: sparsity {evaluated.sparsity:g} loses {evaluated.lost} "
            f"{LOSSES[metric]}: {verdict}",
            flush=True,
        )

    return tell


def conclusion(report: SearchReport, metric: str, healed: bool) -> str:
    """Return what a search has found, in words.

    Args:
        report: of the search.
        metric: that it went by.
        healed: whether the model was healed afterwards.
    """
    found, refused = report.found, report.refused
    assert found is not None  # or there is nothing to say
    lines = [
        f"Sparsity {found.sparsity:g} loses {found.lost} {LOSSES[metric]} on {report.num_examples} train images that "
        f"were held out, and {report.max_drop:g} was allowed."
    ]
    if refused is not None:
        lines.append(f"Sparsity {refused.sparsity:g} loses {refused.lost}.")
    if healed:
        lines.append("Both as they were before healing.")
    return "\n".join(lines)
