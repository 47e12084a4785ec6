"""What `datasets` reads a dataset with, and what it would not see by itself in a folder of images.

By itself it follows no link to a folder, knows the names of splits in small letters alone, finds them in the names of
classes too, and takes folders for classes only where all splits have such folders.
"""

import glob
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import datasets
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from cap_hf.data.arguments import DataArguments
from cap_hf.data.once import warn_once
from cap_hf.errors import CAPError

logger = logging.getLogger(__name__)

# train -> train, training -> train, valid -> validation, ...
SPLIT_WORDS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
# Where `datasets` finds such a word in the name of a folder.
WITHIN = re.compile(f"(?:^|[{NON_WORDS_CHARS}])(?:{'|'.join(SPLIT_WORDS)})(?:$|[{NON_WORDS_CHARS}])")
# The directory of a cached dataset from the Hub is named by its commit, that of a folder by a shorter hash.
COMMIT = re.compile("[0-9a-f]{40}")
# What may say in a folder of its own accord which files its splits have.
CARDS = ("README.md", ".huggingface.yaml")


def open_builders(args: DataArguments, token: str | None) -> list[datasets.DatasetBuilder]:
    """Return what `datasets` reads the splits of a dataset with: its files are known then, and none is read.

    It is one builder, or two where only some splits of a folder of images have folders of classes: the images of the
    others have no labels. Neither have those of folders with one folder per split, such as train/ and test/; `datasets`
    would take the names of the splits for classes.

    Raises:
        CAPError: the dataset is a file, or has a link that leads nowhere or cannot be followed; or it is nowhere, and
            `datasets` has kept what another folder of its name held.
        Exception: whatever `datasets` raises where it cannot open the dataset.
    """
    if os.path.isfile(args.dataset_name):
        raise CAPError(f"--dataset_name {args.dataset_name} is a file: name the folder that it lies in")
    where = {"path": args.dataset_name, "name": args.dataset_config_name, "token": token}
    patterns = unseen_patterns(Path(args.dataset_name)) if os.path.isdir(args.dataset_name) else None
    with only_errors():
        builder = datasets.load_dataset_builder(**where, data_files=patterns)
    if isinstance(builder, Cache):
        # Folders are cached by their last name alone: it may have been any folder of that name, long ago.
        if not COMMIT.fullmatch(str(builder.hash)):
            raise CAPError(f"--dataset_name {args.dataset_name} cannot be loaded: it is no folder, nor on the Hub")
        warn_once(logger, f"The Hub cannot be asked for {args.dataset_name}: what is cached of it is used.")
    if not isinstance(builder, ImageFolder):
        return [builder]
    files = builder.config.data_files
    # An archive has folders of its own, and metadata say what the labels are.
    if any(os.path.splitext(file)[1].lower() not in builder.EXTENSIONS for each in files.values() for file in each):
        return [builder]
    labelled = labelled_splits(files)
    if len(labelled) == len(files) and all(len(set(map(os.path.dirname, each))) > 1 for each in files.values()):
        return [builder]
    groups = [(labelled, False), ([split for split in files if split not in labelled], True)]
    return [
        datasets.load_dataset_builder(
            **where, data_files={str(split): files[split] for split in splits}, drop_labels=drop_labels
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


def unseen_patterns(root: Path) -> dict[str, list[str]] | None:
    """Return patterns of the files of each split in a folder where `datasets` by itself finds too few or too many.

    Returns:
        None where it finds the right ones, or a card says which they are.

    Raises:
        CAPError: a link leads nowhere, or to files that are no images and whose splits no folder tells.
    """
    cards = [root / name for name in CARDS if (root / name).is_file()]
    if any("configs:" in card.read_text(encoding="utf-8", errors="replace") for card in cards):
        return None
    folders = list(folders_in(root))
    links = [folder for folder in folders if folder.is_symlink()]
    top = [folder for folder in folders if folder.parent == root]
    within = [folder for folder in folders if folder.parent != root]
    splits = {folder: SPLIT_WORDS[folder.name.lower()] for folder in top if folder.name.lower() in SPLIT_WORDS}
    misread = any(folder.name not in SPLIT_WORDS for folder in top) or any(WITHIN.search(each.name) for each in within)
    if len(splits) < len(top):
        # Classes, as Car and Train, or something beside the splits, which `datasets` leaves out.
        splits, misread = {folder: split for folder, split in splits.items() if folder.name in SPLIT_WORDS}, False
    if not links and not (splits and misread):
        return None
    found: dict[str, list[str]] = {} if splits else {"train": ["**"]}
    for folder in (*splits, *links):
        relative = folder.relative_to(root)
        split = splits.get(root / relative.parts[0]) if splits else "train"
        if not splits and not any(file.suffix.lower() in ImageFolder.EXTENSIONS for file in folder.rglob("*")):
            raise CAPError(
                f"{folder} is a link to a folder without images, which is not followed: put the files themselves into "
                f"{root}, or a link to each of them"
            )
        if split is not None:
            found.setdefault(split, []).append(f"{glob.escape(str(relative))}/**")
    return {split: list(dict.fromkeys(each)) for split, each in found.items()}


def folders_in(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the folders in a folder, and in these, links to folders too; but none that is hidden or lies above itself.

    Raises:
        CAPError: a link leads nowhere.
    """
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        children = sorted(
            entry.path for entry in entries if not entry.name.startswith((".", "__")) and not _is_file(entry)
        )
    for child in children:
        if os.path.realpath(child) not in above:
            yield Path(child)
            yield from folders_in(Path(child), above)


@contextmanager
def only_errors() -> Iterator[None]:
    """Keep the warnings of `datasets` to itself."""
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def _is_file(entry: os.DirEntry) -> bool:
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise CAPError(f"{entry.path} is a link to {os.readlink(entry.path)}, where nothing is: remove or mend it")
    return not entry.is_dir()
