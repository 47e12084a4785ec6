"""What is said beside the results: warnings once, and those of other libraries not at all where they are of no use."""

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# Warnings may be as many as the images of a dataset: what was said longest ago is forgotten, and may be said again.
REMEMBERED = 1024
# Libraries whose loggers are set alike, and are silenced where somebody has imported them.
LIBRARIES = ("transformers.utils.logging", "datasets.utils.logging")


@functools.lru_cache(REMEMBERED)
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning that would come again with every split, pass, image or file: the same one once per process."""
    logger.warning(message)


@contextmanager
def only_errors() -> Iterator[None]:
    """Keep the warnings of transformers and `datasets` to themselves, and transformers' bars.

    Its report of what was loaded is a table of many lines.
    """
    with ExitStack() as after:
        for library in filter(None, map(sys.modules.get, LIBRARIES)):
            after.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
            if getattr(library, "is_progress_bar_enabled", bool)():
                after.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        yield
