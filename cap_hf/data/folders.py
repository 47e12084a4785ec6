"""What `datasets` reads a dataset with, and what it would not see by itself in a folder of images.

By itself it follows no link to a folder and puts files into the wrong splits, see `listing`, and takes folders for
classes only where all splits have such folders.
"""

import glob
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.fingerprint import Hasher
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from cap_hf.data.arguments import DataArguments
from cap_hf.data.listing import (
    TRAIN,
    Listing,
    by_names,
    has_split_word,
    is_image,
    is_metadata,
    is_picture,
    list_files,
)
from cap_hf.errors import CAPError
from cap_hf.notices import only_errors, warn_once
from cap_hf.targets import summarize

logger = logging.getLogger(__name__)

# The directory of a cached dataset from the Hub is named by its commit, that of a folder by a shorter hash.
COMMIT = re.compile("[0-9a-f]{40}")
# What may say in a folder of its own accord which files its splits have.
CARDS = ("README.md", ".huggingface.yaml")
# Files that hold many examples each.
TABLES = (".parquet", ".arrow", ".tar")
# Lists of images, such as test.csv, which `datasets` reads in the place of the images.
LISTS = (".csv", ".json", ".jsonl", ".tsv", ".txt")


def open_builders(args: DataArguments, token: str | None) -> list[datasets.DatasetBuilder]:
    """Return what `datasets` reads the splits of a dataset with: its files are known then, and none is read.

    It is one builder, or two where only some splits of a folder of images have folders of classes: the images of the
    others have no labels. Neither have those of folders with one folder per split, such as train/ and test/; `datasets`
    would take the names of the splits for classes.

    Raises:
        CAPError: the dataset is a file, or has a link that leads nowhere or cannot be followed, or links alone tell its
            splits; or it is nowhere, and `datasets` has kept what another folder of its name held.
        Exception: whatever `datasets` raises where it cannot open the dataset.
    """
    if os.path.isfile(args.dataset_name):
        raise CAPError(f"--dataset_name {args.dataset_name} is a file: name the folder that it lies in")
    where: dict[str, Any] = {"path": args.dataset_name, "name": args.dataset_config_name, "token": token}
    listed = None
    if os.path.isdir(args.dataset_name) and args.dataset_config_name in (None, "default"):
        listed = listed_splits(Path(args.dataset_name).resolve())
    if listed and not any(is_image(file) for each in listed.values() for file in each):
        # Parquet files and the like, behind links.
        where["data_files"] = {split: [glob.escape(file) for file in each] for split, each in listed.items()}
        listed = None
    try:
        with only_errors():
            builder = datasets.load_dataset_builder(**where)
    except Exception:
        # It finds no files, or files of several kinds; the images among them are known.
        if listed is None:
            raise
        return by_labels(image_folder(listed, args.dataset_name))
    if isinstance(builder, Cache):
        # Folders are cached by their last name alone: it may have been any folder of that name, long ago.
        if not COMMIT.fullmatch(str(builder.hash)):
            raise CAPError(f"--dataset_name {args.dataset_name} cannot be loaded: it is no folder, nor on the Hub")
        warn_once(logger, f"The Hub cannot be asked for {args.dataset_name}: what is cached of it is used.")
    if listed is not None and listed != {split: sorted(each) for split, each in builder.config.data_files.items()}:
        builder = image_folder(listed, args.dataset_name)
    return by_labels(builder) if isinstance(builder, ImageFolder) else [builder]


def image_folder(splits: dict[str, list[str]], name: str) -> ImageFolder:
    """Return what reads a folder of images.

    Args:
        splits: the images of each split.
        name: of the folder.
    """
    # The times of their last changes, as `datasets` has them: it reads the files anew where these differ.
    files = DataFilesDict(
        {
            split: DataFilesList(each, [(str(os.stat(file).st_mtime),) for file in each])
            for split, each in splits.items()
        }
    )
    return ImageFolder(
        dataset_name=Path(name).resolve().name, base_path=name, hash=Hasher.hash(files), data_files=files
    )


def by_labels(builder: ImageFolder) -> list[datasets.DatasetBuilder]:
    """Return a builder as it is, or two of its kind: for the splits with folders of classes, and for the others."""
    files = builder.config.data_files
    # An archive has folders of its own, and metadata say what the labels are.
    if any(not is_image(file) for each in files.values() for file in each):
        return [builder]
    labelled = labelled_splits(files)
    if len(labelled) == len(files) and all(len(set(map(os.path.dirname, each))) > 1 for each in files.values()):
        return [builder]
    groups = [(labelled, False), ([split for split in files if split not in labelled], True)]
    return [
        type(builder)(
            dataset_name=builder.dataset_name,
            config_name=builder.config.name,
            hash=builder.hash,
            base_path=builder.base_path,
            token=builder.token,
            repo_id=builder.repo_id,
            storage_options=builder.storage_options,
            data_files=DataFilesDict({str(split): files[split] for split in splits}),
            drop_labels=drop_labels,
        )
        for splits, drop_labels in groups
        if splits
    ]


def labelled_splits(files: dict[str, list[str]]) -> list[str]:
    """Return the splits whose images lie in folders of classes: all equally deep, and deeper than those of the others.

    Args:
        files: the images of each split.
    """
    folders = {split: {PurePosixPath(file).parent for file in each} for split, each in files.items()}
    depths = {split: {len(folder.parts) for folder in each} for split, each in folders.items()}
    for split, each in depths.items():
        if len(each) > 1:
            ends = [
                next(file for file in files[split] if len(PurePosixPath(file).parts) == n + 1) for n in sorted(each)
            ]
            warn_once(
                logger,
                f"The folders of split {split} are not taken for classes: images lie beside and within them, as "
                f"{ends[0]} and {ends[-1]}",
            )
    deepest = max(max(each) for each in depths.values())
    found = [split for split, each in depths.items() if each == {deepest}]
    # One folder alone is that of the split.
    return found if any(len(folders[split]) > 1 for split in found) else []


def listed_splits(root: Path) -> dict[str, list[str]] | None:
    """Return the files of each split of a folder of images, or of one with links.

    What is left out of it, links to what holds no images and images that lie in no split, is named in a warning.

    Args:
        root: the folder, as a real path.

    Returns:
        Paths in order; None where `datasets` finds the right files by itself, or a card says which they are.

    Raises:
        CAPError: a link leads nowhere; or to files that are no images and whose splits no name tells; or splits are
            told by links within the folder alone.
    """
    cards = [root / name for name in CARDS if (root / name).is_file()]
    if any("configs:" in card.read_text(encoding="utf-8", errors="replace") for card in cards):
        return None
    listing = list_files(root)
    tables = [file for file in listing.files if file.endswith(TABLES) and not is_metadata(file)]
    images = any(is_image(file) for file in listing.files)
    if (tables or not images) and not listing.followed:
        return None
    used = [file for file in listing.files if is_picture(file)] if images else tables
    splits = by_names(used)
    if not used or (tables and (images or not splits)):
        raise CAPError(
            f"{root / listing.followed[0]} is a link to a folder, which is followed to images that are files of their "
            f"own, or where names tell the splits: remove it, or put the files themselves into {root}"
        )
    if not splits:
        lists = [file for file in listing.files if "/" not in file and file.endswith(LISTS)]
        doubtful = next(filter(has_split_word, [*map(os.path.dirname, used), *listing.inner, *lists]), None)
        if doubtful in lists and not listing.followed:
            return None
        if doubtful is not None:
            raise CAPError(
                f"{root / doubtful} is called as a split, and which images are in that split cannot be known: put "
                "those of each split into a folder of their own, such as train and test"
            )
        splits = {TRAIN: used}
    elif lost := {*used}.difference(*splits.values()):
        warn_once(
            logger,
            f"{len(lost)} of the {len(used)} files in {root} are in no split and are left out, such as {min(lost)}",
        )
    warn_of_links(root, used, listing)
    if metadata := list(filter(is_metadata, listing.files)):
        whole = by_names([*used, *metadata]) or {TRAIN: [*used, *metadata]}
        splits = {split: each for split, each in whole.items() if split in splits}
    return {split: sorted(str(root / file) for file in each) for split, each in splits.items()}


def warn_of_links(root: Path, used: list[str], listing: Listing) -> None:
    """Name the links that are left out: they lead to nothing that is used, or to what is used anyway."""
    folders = {parent for file in used for parent in map(str, PurePosixPath(file).parents)}
    useless = [link for link in listing.followed if link not in folders]
    for links, why in ((useless, "no images lie behind them"), (listing.inner, "they lead to what is in it anyway")):
        if links:
            warn_once(logger, f"Links in {root} are left out, since {why}: {summarize(links)}")
