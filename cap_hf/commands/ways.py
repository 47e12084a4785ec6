"""Arguments that say the same thing in several ways, of which a run follows one: what is typed replaces a file's."""

import itertools
from collections.abc import Sequence

# A pattern such as 2:4 is an allocation, and says how sparse as well.
PATTERN = "N:M"
# Each of these holds ways to say the same thing, and what goes with that way. A run follows one of them, so one
# that is typed takes the place of those in a file; what contradicts each other in one place is left for the checks.
WAYS: tuple[dict[str, tuple[str, ...]], ...] = (
    {
        "sparsity": ("num_recomputations",),
        "budget": (),
        "max_accuracy_drop": ("max_drop_metric", "sparsity_step", "max_evaluations", "max_search_samples"),
        PATTERN: ("num_recomputations",),
    },
    {"num_train_epochs": (), "max_steps": ()},
)


def is_replaced(name: str, value: str, typed: Sequence[str]) -> bool:
    """Return whether an argument of a file does not count, since another one of `WAYS` was typed.

    Args:
        name: of the argument, with underscores.
        value: that it has in the file.
        typed: the command line beside the file.
    """
    is_pattern = name == "allocation" and ":" in value and not agrees(value, typed)
    return (PATTERN if is_pattern else name) in replaced(typed)


def replaced(typed: Sequence[str]) -> set[str]:
    """Return the names of the arguments that do not count in a file, since another one of `WAYS` was typed."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in typed if word.startswith("--")}
    words = [part for word in typed for part in word.split("=", 1)]
    if any(name == "--allocation" and ":" in value for name, value in itertools.pairwise(words)):
        names.add(PATTERN)
    left_out: set[str] = set()
    for ways in WAYS:
        chosen = {way for way in ways if way in names}
        others = [way for way in ways if chosen and way not in chosen]
        kept = {name for way in chosen for name in ways[way]}
        left_out |= {name for way in others for name in (way, *ways[way])} - kept
    return left_out


def agrees(allocation: str, typed: Sequence[str]) -> bool:
    """Return whether an allocation such as 2:4 leaves as many weights as the one sparsity that was typed."""
    words = [part for word in typed for part in word.split("=", 1)]
    if "--sparsity" not in words:
        return False
    values = itertools.takewhile(lambda word: not word.startswith("--"), words[words.index("--sparsity") + 1 :])
    kept, _, group = allocation.partition(":")
    try:
        return [float(value) for value in values] == [1 - int(kept) / int(group)]
    except (ValueError, ZeroDivisionError):  # what it is instead is checked later
        return False
