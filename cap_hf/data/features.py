"""Features of images: taken out of a model once, compared with the dense model's, and probed with labels.

An image is described by one vector: what the model pools it to, else its class token, else the mean of its patch
tokens. What a model pools is what is used of it: for DINOv2 it is the class token, for CLIP the class token after its
norm and projection, which the tokens themselves lack. Only these vectors are kept of all images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

from cap_hf.data.patches import SAME_KIND, PatchErrors, PatchTokens
from cap_hf.data.probes import PROBES, check_bank
from cap_hf.data.standard_errors import drop_errors, summarize
from cap_hf.errors import CAPError
from cap_hf.outputs import features_of
from cap_hf.towers import prefix_tokens, see

# Gets of each batch its number among those of this process, the parts of its features, and its images' numbers.
Visitor = Callable[[int, dict[str, torch.Tensor], range], None]


@dataclass
class Features:
    """What a model makes of the images of a dataset; on the CPU.

    Attributes:
        descriptors: one vector per image, `(n, d)` float32.
        labels: `(n,)` int64, None where there are none.
    """

    descriptors: torch.Tensor
    labels: torch.Tensor | None


def extract_features(
    model: nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    disable_tqdm: bool = False,
    visit: Visitor | None = None,
) -> Features:
    """Take all images of a dataset through a model, shared out between the processes.

    Args:
        model: that `see` can call.
        loader: batches of `pixel_values` and, where there are any, `labels`, in a fixed order; not prepared.
        accelerator: from accelerate.
        disable_tqdm: no progress bar.
        visit: called with what the model makes of each of this process's batches.

    Returns:
        The features of all images in the order of the dataset, on every process.

    Raises:
        CAPError: the model returns no features, or they are NaN or infinite.
    """
    prefix, device = prefix_tokens(model), accelerator.device
    model.to(device)
    training = model.training
    model.eval()
    descriptors, labels = [], []
    bar = transformers_logging.tqdm(
        accelerator.prepare_data_loader(loader),
        desc="Extracting features",
        delay=2,
        disable=disable_tqdm or not accelerator.is_main_process,
    )
    with torch.no_grad():
        for index, batch in enumerate(bar):
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            parts = features_of(see(model, batch), prefix)
            own = [describe(parts)] + ([batch["labels"]] if "labels" in batch else [])
            if visit is not None:
                # The processes take batches in turn. accelerate fills its last ones up with images from the beginning.
                place = index * accelerator.num_processes + accelerator.process_index
                first = place * (loader.batch_size or 1)
                visit(index, parts, range(first, first + len(own[0])))
            # Without the images that were there twice.
            gathered = accelerator.gather_for_metrics(tuple(own))
            descriptors.append(gathered[0].cpu())
            labels += [each.cpu() for each in gathered[1:]]
    model.train(training)
    found = torch.cat(descriptors)
    broken = ~found.isfinite().all(dim=1)
    if broken.any():
        raise CAPError(
            f"the features of image {int(broken.int().argmax())} are NaN or infinite: check the model's weights and "
            "its dtype (load it in float32) and the pixel values"
        )
    return Features(found, torch.cat(labels) if labels else None)


def describe(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return one vector per image, `(b, d)` float32, out of the parts that `features_of` finds."""
    for name in ("pooled", "class"):
        if name in parts:
            return parts[name][:, 0].float()
    return next(iter(parts.values())).float().mean(dim=1)


class FeatureEvaluation:
    """Measures models without a head on one dataset: against the dense model, and by what labels say of their features.

    The first may be left out; the second is where there is a bank. The images go through each model once.

    Args:
        loader: of the images to measure on, as for `extract_features`.
        bank: labelled images that k-NN and the linear probe know, or None for neither.
        accelerator: from accelerate.
        disable_tqdm: no progress bars.

    Raises:
        CAPError: the bank is too small.
    """

    def __init__(
        self, loader: DataLoader, bank: DataLoader | None, accelerator: Accelerator, disable_tqdm: bool = False
    ) -> None:
        self.loader, self.bank, self.accelerator, self.disable_tqdm = loader, bank, accelerator, disable_tqdm
        if bank is not None:
            check_bank(len(bank.dataset))  # type: ignore[arg-type]  # a Dataset with a length
        self.tokens: PatchTokens | None = None
        self.dense: torch.Tensor | None = None
        self.dense_hits: dict[str, torch.Tensor] = {}

    def measure_dense(self, model: nn.Module) -> dict[str, float]:
        """Measure the model that those measured afterwards are compared with; result and errors as of `measure`."""
        tokens = PatchTokens(len(self.loader.dataset))  # type: ignore[arg-type]  # a Dataset with a length
        features = extract_features(model, self.loader, self.accelerator, self.disable_tqdm, tokens.keep)
        hits = self._probe(model, features)
        self.tokens, self.dense, self.dense_hits = tokens, features.descriptors, hits
        same = {"cosine": 1.0, "cosine_p5": 1.0} | ({"patch_error": 0.0} if tokens.parts else {})
        return summarize(hits) | same | self._counts()

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure a model.

        Returns:
            On every process: `num_examples`; where there is a bank, of `bank_examples`, `knn_top1` and `linear_top1`
            in [0, 1], each with its standard error, `_se`; where the dense model was measured `cosine` and
            `cosine_p5`, the mean (with its `cosine_se`) and the 5th percentile over the images of the cosine of their
            vectors to the dense model's, `patch_error` (see `PatchErrors.relative`), and the standard errors of the
            drops of the two accuracies, `_drop_se`.

        Raises:
            CAPError: the model returns no features, they are NaN or infinite, or they are of another shape than the
                dense model's.
        """
        errors = None if self.tokens is None else PatchErrors(self.tokens)
        features = extract_features(
            model, self.loader, self.accelerator, self.disable_tqdm, None if errors is None else errors.add
        )
        hits = self._probe(model, features)
        results = summarize(hits)
        if self.dense is not None and errors is not None:
            results |= drop_errors(self.dense_hits, hits)
            results |= compare_descriptors(features.descriptors, self.dense)
            error = errors.relative(self.accelerator)
            if error is not None:
                results["patch_error"] = error
        return results | self._counts()

    def _counts(self) -> dict[str, int]:
        """Return how many images were measured on, and are in the bank."""
        bank = {} if self.bank is None else {"bank_examples": len(self.bank.dataset)}  # type: ignore[arg-type]
        return bank | {"num_examples": len(self.loader.dataset)}  # type: ignore[arg-type]

    def _probe(self, model: nn.Module, features: Features) -> dict[str, torch.Tensor]:
        """Return by probe which of the images it was right about, `(n,)` bool."""
        if self.bank is None:
            return {}
        known = extract_features(model, self.bank, self.accelerator, self.disable_tqdm)
        assert known.labels is not None
        assert features.labels is not None
        return {
            name: probe(known.descriptors, known.labels, features.descriptors) == features.labels
            for name, probe in PROBES.items()
        }


def compare_descriptors(found: torch.Tensor, dense: torch.Tensor) -> dict[str, float]:
    """Return of the cosines between the vectors `(n, d)` of two models the mean, its error and the 5th percentile.

    Raises:
        CAPError: they are not equally long.
    """
    if found.shape != dense.shape:
        raise CAPError(
            f"the model's features have {found.shape[1]} channels and the dense model's {dense.shape[1]}: {SAME_KIND}"
        )
    cosines = F.cosine_similarity(found.double(), dense.double(), dim=1)
    return summarize({"cosine": cosines}) | {"cosine_p5": float(cosines.quantile(0.05))}
