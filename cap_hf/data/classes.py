"""Which of a model's classes a name means: the same name in another spelling, one of its synonyms, or its number."""

import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from cap_hf.errors import CAPError
from cap_hf.notices import warn_once
from cap_hf.targets import summarize

logger = logging.getLogger(__name__)

# 3, 03 or, as transformers calls classes that have no name, LABEL_3.
WHOLE_NUMBER = re.compile(r"(?:label[\s_-]*)?([0-9]+)")
# What stands between the words of a name; that of a folder cannot have all of these.
BETWEEN_WORDS = re.compile(r"[\s_/-]+")
# class10, 10th, 10.0
COUNTED = re.compile(r"(\D*)([0-9]+(?:\.[0-9]+)?)(\D*)")
ADVICE = "name each class as the model does, or call all of them by the model's numbers, from 0"


def number_in(name: str) -> int | None:
    """Return the whole number that a name is, as of `3`, `03` and `LABEL_3`; None for any other name."""
    found = WHOLE_NUMBER.fullmatch(_plain(name))
    return None if found is None else int(found[1])


def key_of(name: str) -> str | int:
    """Return what two spellings of a name have in common: capitals, spaces, `-`, `_` and `/` do not count.

    A name that is a whole number has that number for its key, which no other name has: `-1` is not `1`.
    """
    number, plain = number_in(name), _plain(name)
    return (BETWEEN_WORDS.sub("", plain) or plain) if number is None else number


def synonyms_in(name: str) -> set[str | int]:
    """Return the keys of the synonyms that a name lists, as `tench, Tinca tinca` does; a number is none."""
    parts = [part for part in name.split(",") if part.strip()]
    return {key_of(part) for part in parts if number_in(part) is None} if len(parts) > 1 else set()


class ClassNames:
    """The classes of a model, to be asked which of them a name means.

    Args:
        names: of the classes, by their numbers.

    Attributes:
        names: of the classes, by their numbers.
        named: the names say more than the numbers do: one of them is not the class's own number, as `LABEL_3` is.
        has_numbers: one of the names is a whole number.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = dict(names)
        keys = {number: key_of(name) for number, name in self.names.items()}
        self.named = any(key != number for number, key in keys.items())
        self.has_numbers = any(isinstance(key, int) for key in keys.values())
        self._by_name = _inverse((name, number) for number, name in self.names.items())
        self._by_key = _inverse((key, number) for number, key in keys.items())
        self._by_synonym = _inverse((each, number) for number, name in names.items() for each in synonyms_in(name))

    def __str__(self) -> str:
        return f"the model has {len(self.names)}: {summarize(list(self.names.values()))}"

    def meant_by(self, name: str) -> frozenset[int]:
        """Return the numbers of the classes that a name may mean: one if it is understood, none if it is not known.

        Looked for in this order: the name itself; the name in another spelling, see `key_of`; a synonym that either
        side lists, see `synonyms_in`; the class's number, where no class is called by a number.
        """
        key, none = key_of(name), frozenset[int]()
        found = self._by_name.get(name) or self._by_key.get(key)
        if found is None:
            keys = (key, *synonyms_in(name))
            found = none.union(*(index.get(each, none) for each in keys for index in (self._by_synonym, self._by_key)))
        if not found and not self.has_numbers and isinstance(key, int) and key in self.names:
            return frozenset({key})
        return found


def pair(names: Sequence[str], model: ClassNames, column: str) -> list[int]:
    """Return the model's number of each class of a dataset, which numbers its classes in the order of their names.

    Names that all mean a class of the model, each another one, are paired by name. Else, where the dataset has as many
    classes as the model and no name means one in another place than its own, they are paired by number, and a warning
    shows some pairs: the names are other words, or the model has none. Names that are whole numbers are these numbers,
    wherever they stand; those with a number in them, as class10, have to stand in the order of their numbers.

    Args:
        names: of the classes of the dataset, in its order.
        model: its classes.
        column: of the labels, for what is said.

    Raises:
        CAPError: which classes the names mean cannot be known; it lists the names that are in doubt.
    """
    meant = [model.meant_by(name) for name in names]
    words, numbers = words_and_numbers(names)
    unknown = [name for name, each in zip(names, meant, strict=True) if not each]
    in_place = len(names) == len(model.names) and all(place in each for place, each in enumerate(meant) if each)
    mixed = bool(words and numbers) and not model.has_numbers
    if all(len(each) == 1 for each in meant) and len({*meant}) == len(names) and (in_place or not mixed):
        return [number for each in meant for number in each]
    if in_place and (words or not unknown):
        if unknown:
            places = {place: name for place, name in enumerate(names) if not meant[place]}
            check_counted(places, model, column)
            pairs = [f"{name} for {model.names[place]}" for place, name in places.items()]
            warn_once(
                logger,
                f"{len(pairs)} of the {len(names)} classes of {column!r} are not called as in the model and are paired "
                f"with its classes by number: {summarize(pairs, 3)}. If a pair is wrong, {ADVICE}",
            )
        return list(range(len(names)))
    check_numbers(names, model, column)
    if unknown:
        which = "none of these names" if len(unknown) == len(names) else f"but not {summarize(unknown)}"
        raise CAPError(f"{column!r} has {len(names)} classes ({summarize(names)}), {model}, {which}: {ADVICE}")
    several = [name for name, each in zip(names, meant, strict=True) if len(each) > 1]
    if several:
        raise CAPError(f"several classes of the model are called as {column!r} has it, {summarize(several)}: {ADVICE}")
    alike = [name for name, each in zip(names, meant, strict=True) if meant.count(each) > 1]
    raise CAPError(f"several classes of {column!r} are one class of the model, {summarize(alike)}: {ADVICE}")


def check_numbers(names: Sequence[str], model: ClassNames, column: str) -> None:
    """Raise a CAPError if names are whole numbers from 1, or only some of them are numbers and none of the model's."""
    words, numbers = words_and_numbers(names)
    if words and numbers and not model.has_numbers:
        raise CAPError(
            f"{column!r} mixes names ({summarize(words, 3)}) and numbers ({summarize(numbers, 3)}): {ADVICE}"
        )
    count, found = len(model.names), {int(key_of(name)): name for name in numbers}
    if not words and found and min(found) > 0 and max(found) == count and not model.meant_by(found[count]):
        raise CAPError(f"{column!r} counts the classes from 1 to {count}, the model counts from 0: take 1 from each")


def check_counted(names: Mapping[int, str], model: ClassNames, column: str) -> None:
    """Raise a CAPError if names with a number in them do not stand in the order of their numbers, or count from 1.

    Such are class1, class10, class2, as folders are sorted. Names of the model with the same numbers make it right.

    Args:
        names: that mean no class of the model, by the classes they would be paired with.
        model: its classes.
        column: of the labels.
    """
    groups: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for place, name in names.items():
        if (found := COUNTED.fullmatch(_plain(name))) is not None:
            groups[found[1], found[3]].append((float(found[2]), place))
    for group in groups.values():
        own = [COUNTED.fullmatch(_plain(model.names[place])) for _, place in group]
        numbers = [number for number, _ in group]
        if [each and float(each[2]) for each in own] == numbers:
            continue
        advice = f"which class of the model each of them is cannot be known ({model}): call the classes 0, 1, 2 ... "
        advice += "by the model's numbers, or give the model these names in the id2label of its config.json"
        for (one, place), (other, following) in pairwise(group):
            if one >= other:
                raise CAPError(
                    f"{column!r} has {names[place]} before {names[following]}, against their numbers: {advice}"
                )
        if numbers == list(range(1, len(model.names) + 1)):
            raise CAPError(
                f"{column!r} counts from {names[group[0][1]]} to {names[group[-1][1]]}, not from 0: {advice}"
            )


def check_integers(values: Iterable[int], model: ClassNames, column: str) -> None:
    """Raise a CAPError if integers are numbered from 1, or the model calls its classes by other numbers than theirs."""
    other = next((number for number, name in model.names.items() if number_in(name) not in (None, number)), None)
    if other is not None:
        raise CAPError(
            f"{column!r} holds numbers, and the model calls its class {other} {model.names[other]!r}: whether they are "
            "its numbers or its names cannot be known. Make it a column of text or classes, which are taken as names"
        )
    check_numbers([str(value) for value in values if value >= 0], model, column)


def words_and_numbers(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names that are words, and those that are whole numbers."""
    words: list[str] = []
    numbers: list[str] = []
    for name in names:
        (words if number_in(name) is None else numbers).append(name)
    return words, numbers


def _plain(name: str) -> str:
    """Return a name without capitals, and with each letter in one of the several ways in which Unicode has it."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).strip()


def _inverse(pairs: Iterable[tuple[str | int, int]]) -> dict[str | int, frozenset[int]]:
    found: dict[str | int, frozenset[int]] = {}
    for key, number in pairs:
        found[key] = found.get(key, frozenset()) | {number}
    return found
