"""Warnings that would come again with every split, pass and image, said once."""

import functools
import logging

# A dataset may have as many faults as images: what was said longest ago is forgotten, and may be said again.
REMEMBERED = 1024


@functools.lru_cache(REMEMBERED)
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, the same one once per process."""
    logger.warning(message)
