"""The splits that a command reads, all through `datasets`: downloaded as a whole, or streamed in part."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from cap_hf.data.arguments import DataArguments
from cap_hf.data.folders import open_builders
from cap_hf.data.keeping import cache_trouble, kept_split
from cap_hf.data.streaming import Streamer
from cap_hf.errors import CAPError, reason
from cap_hf.extras import need
from cap_hf.targets import summarize

EVAL_SPLITS = ("validation", "test")


def load_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 real 8x8 digits: 3 in 4 to train, the others, as many of each digit, to test."""
    need("sklearn", "demo")
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(d) for d in range(10)]))
    parts = train_test_split(pixels, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    splits = {"train": (parts[0], parts[2]), "test": (parts[1], parts[3])}
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"image": [Image.fromarray(image) for image in images], "label": labels}, features=features
            )
            for name, (images, labels) in splits.items()
        }
    )


def load_splits(
    args: DataArguments,
    seed: int = 42,
    token: str | None = None,
    needed: Sequence[str] = ("train", "eval"),
    train_examples: int | None = None,
) -> datasets.DatasetDict:
    """Load the dataset and name its splits `train` and `eval`.

    A dataset on the Hub is streamed, unless its whole train split is needed: only what is asked for is fetched, and
    kept (see `kept_split`). Everything else is loaded as a whole, and limits are drawn from it.

    Args:
        args: which data.
        seed: of a held-out split, and of the examples where there is a limit.
        token: for a private Hub dataset.
        needed: which of the two the caller uses; the other need not exist.
        train_examples: how many train examples the caller needs; a split that is not streamed has all the same.

    Raises:
        CAPError: the dataset cannot be loaded, or a split is missing.
    """
    for name, limit in (("train", args.max_train_samples), ("eval", args.max_eval_samples)):
        if name in needed and limit is not None and limit < 1:
            raise CAPError(f"max_{name}_samples={limit} must be at least 1")
    limits = [limit for limit in (args.max_train_samples, train_examples) if limit is not None]
    train_limit = min(limits, default=None)
    if is_embedded(args) or not is_streamed(args, "train" in needed and train_limit is None):
        splits = whole_splits(args, seed, token, needed)
    else:
        splits = streamed_splits(args, seed, token, needed, {"train": train_limit, "eval": args.max_eval_samples})
    for name, split in splits.items():
        if not len(split):
            raise CAPError(f"the {name} split of {args.dataset_name} is empty")
    return datasets.DatasetDict(splits)


def is_embedded(args: DataArguments) -> bool:
    """Return whether the data are the digits that need no file."""
    return args.dataset_name == "digits" and not Path("digits").is_dir()


def is_streamed(args: DataArguments, all_needed: bool) -> bool:
    """Return whether the dataset is streamed: as the user says, else where it is on the Hub and not all is needed."""
    if args.streaming is not None:
        return args.streaming
    return not all_needed and not os.path.exists(args.dataset_name) and not datasets.config.HF_HUB_OFFLINE


def whole_splits(
    args: DataArguments, seed: int, token: str | None, needed: Sequence[str]
) -> dict[str, datasets.Dataset]:
    """Return the splits of a dataset that is loaded as a whole."""
    loaded: dict[str, datasets.Dataset] = load_digits() if is_embedded(args) else {}
    if not loaded:
        try:
            for builder in open_builders(args, token):
                builder.download_and_prepare()
                loaded |= builder.as_dataset()
        except Exception as error:  # whatever a builder, a file or the network raises
            raise cannot_load(args, token, error) from error
    found = {name: loaded[split] for name, split in choose_splits(args, list(loaded), needed).items()}
    if held_out := held_share(args, list(loaded), needed):
        try:
            halves = found["train"].train_test_split(held_out, seed=seed)
        except ValueError as error:
            raise CAPError(
                f"{len(found['train'])} train images are too few to hold {held_out:g} of them out: give more of them "
                "or another --train_val_split"
            ) from error
        found = {"train": halves["train"], "eval": halves["test"]}
    for name, limit in (("train", args.max_train_samples), ("eval", args.max_eval_samples)):
        if name in found and limit is not None and limit < len(found[name]):
            found[name] = found[name].shuffle(seed=seed).select(range(limit))
    return {name: split for name, split in found.items() if name in needed}


def streamed_splits(
    args: DataArguments, seed: int, token: str | None, needed: Sequence[str], limits: dict[str, int | None]
) -> dict[str, datasets.Dataset]:
    """Return what is needed of the splits of a dataset that is streamed."""
    streamers: dict[str, Streamer] = {}
    try:
        for builder in open_builders(args, token):
            streamer = Streamer(builder)
            streamers |= dict.fromkeys(streamer.splits, streamer)
    except Exception as error:  # whatever a builder, a file or the network raises
        raise cannot_load(args, token, error) from error
    chosen = choose_splits(args, list(streamers), needed)
    share = held_share(args, list(streamers), needed)
    if share is not None:
        chosen["eval"] = chosen["train"]
    return {
        name: kept_split(
            streamers[chosen[name]], chosen[name], limits[name], args, seed, share, held_out=name == "eval"
        )
        for name in ("train", "eval")
        if name in needed
    }


def choose_splits(args: DataArguments, names: Sequence[str], needed: Sequence[str]) -> dict[str, str]:
    """Return the names in the dataset of the splits to read; of the train split alone where a share is held out.

    Raises:
        CAPError: a split is missing.
    """
    chosen = {}
    eval_name = find_eval_split(args, names)
    if "train" in needed or eval_name is None:
        chosen["train"] = args.train_split_name
    if "eval" in needed and eval_name is not None:
        chosen["eval"] = eval_name
    for name in chosen.values():
        if name not in names:
            raise CAPError(f"{args.dataset_name} has no split {name!r}; it has {summarize(list(names))}")
    return chosen


def find_eval_split(args: DataArguments, names: Sequence[str]) -> str | None:
    """Return the split to evaluate on, or None where a share of the train split has to be held out."""
    return args.eval_split_name or next(
        (name for name in EVAL_SPLITS if name in names and name != args.train_split_name), None
    )


def held_share(args: DataArguments, names: Sequence[str], needed: Sequence[str]) -> float | None:
    """Return the share of the train split to hold out, None where nothing is.

    Raises:
        CAPError: nothing says what to evaluate on, or the share is none.
    """
    if "eval" not in needed or find_eval_split(args, names) is not None:
        return None
    if args.train_val_split is None:
        raise CAPError(
            f"{args.dataset_name} has no validation or test split, only {summarize(list(names))}: name one with "
            "--eval_split_name or hold a share out with --train_val_split 0.15"
        )
    return args.train_val_split


def cannot_load(args: DataArguments, token: str | None, error: Exception) -> CAPError:
    """Return what is wrong where a dataset cannot be loaded: the configuration, the disk of the cache, or what it says.

    Args:
        args: which data.
        token: for a private Hub dataset.
        error: what was raised.
    """
    if isinstance(error, CAPError):
        return error
    if trouble := cache_trouble(error):
        return trouble
    names: list[str] = []
    if isinstance(error, ValueError):
        with suppress(Exception):  # what was raised first says more
            names = datasets.get_dataset_config_names(args.dataset_name, token=token)
    asked = args.dataset_config_name
    if asked is None and len(names) > 1:
        return CAPError(
            f"{args.dataset_name} has several configurations: choose one with --dataset_config_name, {summarize(names)}"
        )
    if asked is not None and names and asked not in names:
        return CAPError(f"{args.dataset_name} has no --dataset_config_name {asked}; it has {summarize(names)}")
    # That an error occurred while the dataset was generated is all that this one says.
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    return CAPError(f"--dataset_name {args.dataset_name} cannot be loaded: {reason(cause)}")
