"""What commands load before they begin: a checkpoint, its image processor, the splits of the data."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import transformers
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from cap_hf.checkpoints import processors
from cap_hf.checkpoints.form import StoredForm, find_form
from cap_hf.checkpoints.loading import find_companions, load_checkpoint
from cap_hf.commands.arguments import ModelArguments
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import ImageDataset
from cap_hf.data.labels import find_columns
from cap_hf.data.splits import load_splits
from cap_hf.errors import CAPError, reason
from cap_hf.towers import image_shape, is_classifier, picks_label, tower_name, vision_config

logger = logging.getLogger(__name__)

# Seconds that the Hub may take to answer before only what is cached is used.
ANSWER_SECONDS = 10.0


def hide_bars() -> None:
    """Have neither transformers nor `datasets` show a progress bar in this process."""
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def load_model(args: ModelArguments) -> PreTrainedModel:
    """Return the checkpoint in float32, whole: a weight that it lacks is an error, never a random one.

    Raises:
        CAPError: the checkpoint cannot be loaded or lacks weights, or no part of its model takes images.
    """
    model = load_checkpoint(args.model_name_or_path, args.trust_remote_code, "float32", **where_to_load(args))
    tower_name(model)
    return model


def load_image_processor(args: ModelArguments) -> Any:
    """Return the checkpoint's own image processor.

    Raises:
        CAPError: it has none, or one that cannot be loaded.
    """
    return processors.load_image_processor(args.model_name_or_path, args.trust_remote_code, **where_to_load(args))


def load_companions(args: ModelArguments) -> list[Path]:
    """Return the files of the checkpoint that go wherever its weights go; as `find_companions`, errors as there."""
    return find_companions(args.model_name_or_path, **where_to_load(args))


def load_form(args: ModelArguments, model: PreTrainedModel) -> StoredForm:
    """Return the form that the weights of a checkpoint are stored in, from which a model was loaded; as `find_form`."""
    return find_form(args.model_name_or_path, model, **where_to_load(args))


def load_all(
    model_args: ModelArguments,
    data_args: DataArguments,
    seed: int,
    needed: Sequence[str] = ("train", "eval"),
    train_examples: int | None = None,
    bank_size: int = 0,
    apart: int | None = None,
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """Return a model, its image processor and the splits of the data that are needed, unprocessed.

    Args:
        model_args: which model.
        data_args: which data.
        seed: of the splits.
        needed: `train`, `eval` or both.
        train_examples: how many of the train split are needed; None for all.
        bank_size: where a model without a head is evaluated on labelled images, how many train images to take for the
            split `bank`, see `bank_split`; 0 for no such split.
        apart: how many of the train examples are kept out of that split; None for `train_examples`.

    Raises:
        CAPError: as `load_model`, `load_image_processor` and `load_splits`.
    """
    transformers.set_seed(seed)
    model = load_model(model_args)
    image_processor = load_image_processor(model_args)

    def load(names: Sequence[str], count: int | None) -> dict[str, Any]:
        return dict(load_splits(data_args, seed, model_args.token, names, count))

    if bank_size < 1 or "eval" not in needed or is_classifier(model):
        return model, image_processor, load(needed, train_examples)
    # Whether there are labels says how much of the train split is needed.
    splits = load(["eval"], None)
    if find_columns(splits["eval"].features, data_args)[1] is None:
        return model, image_processor, splits if "train" not in needed else load(needed, train_examples)
    used = 0 if "train" not in needed else train_examples
    apart = (used if apart is None else apart) or 0
    try:
        splits = load(["train", "eval"], None if used is None else max(used, apart + bank_size))
    except CAPError as error:
        if "train" in needed:
            raise
        raise CAPError(
            f"k-NN and the linear probe need labelled train images (leave them out with --knn_bank_size 0): {error}"
        ) from error
    splits["bank"] = bank_split(splits["train"], apart, bank_size, seed)
    return model, image_processor, {name: split for name, split in splits.items() if name in (*needed, "bank")}


def bank_split(split: datasets.Dataset, used: int, size: int, seed: int) -> datasets.Dataset:
    """Return `size` examples of a train split, apart from the first `used` that `calibration_split` takes if possible.

    These come in only where there are not enough others; a smaller split is taken whole.
    """
    count = len(split)
    used = min(used, count)
    return split.shuffle(seed=seed).select([*range(used, count), *range(used)][:size])


def image_dataset(
    split: datasets.Dataset, image_processor: Any, model: PreTrainedModel, args: DataArguments
) -> ImageDataset:
    """Return a split as the inputs of a model, or of its vision tower.

    Raises:
        CAPError: as `ImageDataset`, whose first example is made here, before anything takes its time.
    """
    config = vision_config(model) or model.config
    channels, _, _ = image_shape(model)
    dataset = ImageDataset(split, image_processor, config, args, picks_label(model), channels)
    dataset.__getitems__([0])
    return dataset


def where_to_load(args: ModelArguments) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where a checkpoint comes from.

    The Hub is asked once. Where it does not answer only the cache is used: transformers would try every file six times,
    for half a minute each, or for minutes where the network swallows what is sent.
    """
    return {
        "revision": args.model_revision,
        "cache_dir": args.cache_dir,
        "token": args.token,
        "local_files_only": not hub_answers(args),
    }


def hub_answers(args: ModelArguments) -> bool:
    """Return False if a checkpoint is on the Hub and the Hub cannot be asked for it."""
    if os.path.isdir(args.model_name_or_path):
        return True
    try:
        huggingface_hub.model_info(
            args.model_name_or_path, revision=args.model_revision, token=args.token, timeout=ANSWER_SECONDS
        )
    except HfHubHTTPError:
        return True  # it answers; what it says is for from_pretrained to report
    except OfflineModeIsEnabled:
        return False
    except Exception as error:  # whatever the HTTP client in use raises where nobody answers
        logger.warning("The Hub cannot be reached (%s): only what is cached is used", reason(error))
        return False
    return True
