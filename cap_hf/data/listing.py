"""Which files of a folder belong to which split, whatever is a link in it.

`datasets` by itself follows no link to a folder and knows the words of splits in small letters alone. Here a folder
that is a link counts as what it leads to, and the splits are those that `datasets` finds in the same tree without
links, but for two: capitals do not count in folders, and a file is in one split only.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datasets.data_files import FILES_TO_IGNORE, NON_WORDS_CHARS, SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from cap_hf.errors import CAPError

# train -> train, training -> train, valid -> validation, ...
SPLIT_WORDS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
# Such a word in the name of a folder or file, between these characters or its ends.
WORD = re.compile(f"(?<![^{NON_WORDS_CHARS}])(?:{'|'.join(SPLIT_WORDS)})(?![^{NON_WORDS_CHARS}])")
TRAIN = "train"


@dataclass
class Listing:
    """What lies in a folder, links followed.

    Attributes:
        files: by their paths within the folder, in order; none that is hidden.
        followed: the links to folders that were followed.
        inner: the links that were not, because they lead to what is in the folder anyway, or back above themselves.
    """

    files: list[str] = field(default_factory=list)
    followed: list[str] = field(default_factory=list)
    inner: list[str] = field(default_factory=list)


def list_files(root: Path) -> Listing:
    """Return what lies in a folder.

    Raises:
        CAPError: a link leads nowhere.
    """
    listing = Listing()
    _walk(root, "", (os.path.realpath(root),), listing)
    return listing


def is_image(file: str) -> bool:
    """Return whether a file is an image, by its name."""
    return PurePosixPath(file).suffix.lower() in ImageFolder.EXTENSIONS


def is_picture(file: str) -> bool:
    """Return whether a file is an image or what may be an archive of images, by its name."""
    return is_image(file) or file.lower().endswith(".zip")


def is_metadata(file: str) -> bool:
    """Return whether a file says of its own accord what the labels of the images beside it are."""
    return PurePosixPath(file).name in ImageFolder.METADATA_FILENAMES


def by_names(files: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each split that names tell, without those of none; nothing where no name tells any.

    The topmost folder with a word of exactly one split says the split; where no folder has one, the files' own names
    do. A folder named Train beside others that are no splits is a class, as in Car, Train.

    Args:
        files: by their paths within the dataset's folder.
    """
    folders = {folder: _split_of_folder(folder) for folder in {PurePosixPath(file).parent for file in files}}
    by_folder = [folders[PurePosixPath(file).parent] for file in files]
    if {*by_folder} == {None, TRAIN} and not any(WORD.search(part) for folder in folders for part in folder.parts):
        by_folder = [None] * len(files)
    for splits in (by_folder, [_only_split(PurePosixPath(file).name) for file in files]):
        if any(splits):
            names = [name for name in map(str, SPLIT_KEYWORDS) if name in splits]
            return {name: [file for file, each in zip(files, splits, strict=True) if each == name] for name in names}
    return {}


def has_split_word(path: str) -> bool:
    """Return whether a folder on a path, its last part among them, is called as a split other than `train` is."""
    return any(SPLIT_WORDS[word] != TRAIN for part in PurePosixPath(path).parts for word in WORD.findall(part.lower()))


def _split_of_folder(folder: PurePosixPath) -> str | None:
    """Return the split that the topmost part of a path with a word of exactly one split says."""
    return next(filter(None, (_only_split(part.lower()) for part in folder.parts)), None)


def _only_split(name: str) -> str | None:
    found = {SPLIT_WORDS[word] for word in WORD.findall(name)}
    return found.pop() if len(found) == 1 else None


def _walk(folder: Path, place: str, trees: tuple[str, ...], listing: Listing) -> None:
    """List a folder.

    Args:
        folder: to be listed.
        place: its path within the dataset's folder, with a `/` at its end.
        trees: the real paths of the dataset's folder and of the links that led here.
        listing: to be added to.
    """
    with os.scandir(folder) as entries:
        children = sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
    for each in children:
        path = place + each.name
        if each.is_symlink() and not os.path.exists(each.path):
            raise CAPError(f"{each.path} is a link to {os.readlink(each.path)}, where nothing is: remove or mend it")
        if not each.is_dir():
            if each.is_file() and each.name not in FILES_TO_IGNORE:
                listing.files.append(path)
            continue
        if each.name.startswith("__"):
            continue
        if each.is_symlink():
            real = os.path.realpath(each.path)
            if any(os.path.commonpath([real, tree]) in (real, tree) for tree in trees):
                listing.inner.append(path)
                continue
            listing.followed.append(path)
            _walk(Path(each.path), f"{path}/", (*trees, real), listing)
        else:
            _walk(Path(each.path), f"{path}/", trees, listing)
