"""The image processor of a checkpoint, if it has one."""

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor
from transformers.utils.hub import cached_files

from cap_hf.checkpoints.explaining import PROCESSOR_NAMES, explain_processor
from cap_hf.errors import CAPError
from cap_hf.notices import only_errors

logger = logging.getLogger(__name__)


def load_image_processor(name_or_path: str | Path, trust_remote_code: bool = False, **source: Any) -> Any:
    """Return the image processor of a checkpoint.

    Args:
        name_or_path: a Hub id, or a folder.
        trust_remote_code: run the code that the checkpoint brings along; nobody is asked.
        source: where `from_pretrained` finds it: `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        CAPError: it has none, or one that cannot be loaded.
    """
    try:
        # Without torchvision the processor falls back to PIL and says so in a warning of several lines.
        with only_errors():
            return AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **source)
    except Exception as error:  # configuration, network
        raise CAPError(explain_processor(name_or_path, error)) from error


def find_image_processor(name_or_path: str | Path, trust_remote_code: bool = False, **source: Any) -> Any | None:
    """Return the image processor of a checkpoint; None if it has none. Arguments as of `load_image_processor`.

    Raises:
        CAPError: it has one that cannot be loaded.
    """
    try:
        return load_image_processor(name_or_path, trust_remote_code, **source)
    except CAPError:
        try:
            files = cached_files(
                name_or_path, list(PROCESSOR_NAMES), _raise_exceptions_for_missing_entries=False, **source
            )
        except Exception:  # what failed first says more
            files = [""]
        if files:
            raise
        return None


def near_image_processor(model: nn.Module) -> Any | None:
    """Return the image processor beside the checkpoint that a model was loaded from, if it is on this machine.

    One that cannot be loaded is told of and left: who has a model at hand need not have what its processor takes.
    """
    name = getattr(model, "name_or_path", None)
    if not name or (os.path.isabs(name) and not os.path.isdir(name)):
        return None
    try:
        return find_image_processor(name, local_files_only=True)
    except CAPError as error:
        logger.warning("%s: the config says how large images are; image_size says otherwise", error)
        return None
