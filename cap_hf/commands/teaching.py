"""Whom a recovery learns from, and what its student was pruned with."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from cap_hf.commands.arguments import ModelArguments
from cap_hf.commands.common import load_image_processor, load_model
from cap_hf.config import CONFIG_NAME, CAPConfig
from cap_hf.errors import CAPError, reason
from cap_hf.recovery.distillation import check_pixels

logger = logging.getLogger(__name__)


def load_teacher(name: str | None, model_args: ModelArguments, image_processor: Any) -> PreTrainedModel | None:
    """Return the dense model to learn from, if one is named.

    Raises:
        CAPError: it cannot be loaded, or was trained on pixels that are normalised otherwise.
    """
    if name is None:
        return None
    teacher_args = replace(model_args, model_name_or_path=name, model_revision="main")
    teacher = load_model(teacher_args)
    try:
        own = load_image_processor(teacher_args)
    except CAPError as error:
        logger.warning("The teacher is given the student's pixels, as %s", error)
        return teacher
    check_pixels(image_processor, own)
    return teacher


def student_config(model_args: ModelArguments) -> CAPConfig | None:
    """Return the CAPConfig that the student was pruned with, if its checkpoint has one.

    Raises:
        CAPError: it has one that cannot be read.
    """
    found = cached_file(
        model_args.model_name_or_path,
        CONFIG_NAME,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    try:
        return CAPConfig.load(Path(found).parent)
    except (OSError, TypeError, ValueError) as error:
        raise CAPError(f"{CONFIG_NAME} of {model_args.model_name_or_path} cannot be read: {reason(error)}") from error
