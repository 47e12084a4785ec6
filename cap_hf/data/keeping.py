"""What was streamed once is kept, so that each pass, each process and each later run has the same examples."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter
from transformers.utils import logging as transformers_logging

from cap_hf.data.arguments import DataArguments
from cap_hf.data.labels import find_columns
from cap_hf.data.streaming import Streamer
from cap_hf.errors import CAPError, reason

# Raised when the order or the choice of what is streamed changes: what older versions kept is then not read.
FORMAT = 1
# What the system says of a place where nothing can be written, or where a file stands in the way of a folder.
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
# Examples per record batch of the kept file.
BATCH = 16


def kept_split(
    streamer: Streamer,
    split: str,
    count: int | None,
    args: DataArguments,
    seed: int,
    share: float | None = None,
    held_out: bool = False,
) -> datasets.Dataset:
    """Return examples of a split from the file that keeps them; stream them first where there is none.

    The first process of a machine streams and the others wait for the file: a lock of the system says whose turn it
    is, and is free again as soon as its holder has ended, however that was.

    Args:
        streamer: of the dataset.
        split: its name.
        count: how many examples; None for all.
        args: names of the columns, and the size of the buffer.
        seed: of the choice and the order of the examples.
        share: of the split that is held out.
        held_out: whether the examples are those that are held out.

    Returns:
        The encoded images, and the labels if there are any; fewer examples where the split has no more.

    Raises:
        CAPError: the network or a file fails on the way, the cache is full or cannot be written, or a column is
            missing; nothing is kept then.
    """
    builder = streamer.builder
    # The cache folder of the builder names the dataset, its configuration and the revision, or state, of its files.
    asked: dict[str, Any] = {
        "format": FORMAT,
        "dataset": str(builder.cache_dir),
        "files": [str(file) for file in builder.config.data_files[split]],
        "split": split,
        "columns": [args.image_column_name, args.label_column_name],
        "count": count,
        "seed": seed,
        "ahead": args.shuffle_buffer_size,
        "held_out": None if share is None else [share, held_out],
    }
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    file = Path(datasets.config.HF_DATASETS_CACHE) / "cap_hf" / f"{key}.arrow"
    try:
        with _locked(file.with_suffix(".lock")):
            if not file.exists():
                _write(file, streamer, split, count, args, seed, share, held_out)
        return datasets.Dataset.from_file(str(file))
    except CAPError:
        raise
    except Exception as error:  # whatever a builder, a file, the disk or the network raises
        said = f"--dataset_name {args.dataset_name} cannot be streamed: {reason(error)}"
        raise cache_trouble(error) or CAPError(said) from error


def cache_trouble(error: BaseException) -> CAPError | None:
    """Return what is wrong with the folder in which `datasets` keeps what it reads, None where that is not the trouble.

    Args:
        error: what `datasets` or this module raised; what it was raised from is looked at too.
    """
    cache = os.path.realpath(datasets.config.HF_DATASETS_CACHE)
    advice = "name another place with the environment variable HF_DATASETS_CACHE (or HF_HOME)"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            if cause.errno in (errno.ENOSPC, errno.EDQUOT) or "Not enough disk space" in str(cause):
                return CAPError(f"the disk of the datasets cache, {cache}, is full: free some space, or {advice}")
            # In it, or above it where the first of its folders cannot be made.
            places = [os.path.realpath(place) for place in (cause.filename, cause.filename2) if isinstance(place, str)]
            near = any(os.path.commonpath([cache, place]) in (cache, place) for place in places)
            if near and cause.errno in CLOSED:
                return CAPError(f"the datasets cache, {cache}, cannot be written: {reason(cause)}: {advice}")
        cause = cause.__cause__ or cause.__context__
    return None


def _write(
    file: Path,
    streamer: Streamer,
    split: str,
    count: int | None,
    args: DataArguments,
    seed: int,
    share: float | None,
    held_out: bool,
) -> None:
    """Stream into a file that gets its name once it is whole."""
    features = streamer.features(split)
    columns = [column for column in find_columns(features, args) if column is not None]
    kept = datasets.Features({column: features[column] for column in columns})
    # Nobody else has the name: the lock is held. What a killed run left under it is written over.
    partial = file.with_suffix(".partial")
    try:
        with (
            closing(streamer.read(split, columns, seed, args.shuffle_buffer_size, share, held_out)) as examples,
            ArrowWriter(path=str(partial), features=kept, writer_batch_size=BATCH) as writer,
        ):
            chosen = islice(examples, count)
            written = 0
            for example in transformers_logging.tqdm(chosen, desc=f"Streaming {split}", total=count, delay=2):
                writer.write({column: example[column] for column in columns})
                written += 1
            if not written:
                raise CAPError(f"the {split} split of {args.dataset_name} is empty")
            writer.finalize()
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
