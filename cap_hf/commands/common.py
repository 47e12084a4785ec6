"""What commands load before they begin: a checkpoint, its image processor, the splits of the data."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import AutoImageProcessor, PreTrainedModel

from cap_hf.checkpoints.loading import load_checkpoint, only_errors
from cap_hf.commands.arguments import ModelArguments
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import ImageDataset, load_splits
from cap_hf.errors import CAPError, reason

logger = logging.getLogger(__name__)

# Seconds that the Hub may take to answer before only what is cached is used.
ANSWER_SECONDS = 10.0


def load_model(args: ModelArguments) -> PreTrainedModel:
    """Return the checkpoint in float32, whole: a weight that it lacks is an error, never a random one.

    Raises:
        CAPError: the checkpoint cannot be loaded or lacks weights.
    """
    return load_checkpoint(args.model_name_or_path, args.trust_remote_code, "float32", **where_to_load(args))


def load_image_processor(args: ModelArguments) -> Any:
    """Return the checkpoint's own image processor.

    Raises:
        CAPError: it has none.
    """
    source = where_to_load(args)
    try:
        # Without torchvision the processor falls back to PIL and says so in a warning of several lines.
        with only_errors():
            return AutoImageProcessor.from_pretrained(
                args.model_name_or_path, trust_remote_code=args.trust_remote_code, **source
            )
    except Exception as error:  # configuration, network
        raise CAPError(f"{args.model_name_or_path} has no image processor: {reason(error)}") from error


def load_all(
    model_args: ModelArguments, data_args: DataArguments, seed: int, needed: Sequence[str] = ("train", "eval")
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """Return a model, its image processor and the splits of the data that are needed, unprocessed.

    Raises:
        CAPError: as `load_model`, `load_image_processor` and `load_splits`.
    """
    transformers.set_seed(seed)
    model = load_model(model_args)
    return model, load_image_processor(model_args), load_splits(data_args, seed, model_args.token, needed)


def eval_dataset(splits: dict, image_processor: Any, model: PreTrainedModel, args: DataArguments) -> ImageDataset:
    """Return the eval split as the model's inputs."""
    return ImageDataset(splits["eval"], image_processor, model.config, args)


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
