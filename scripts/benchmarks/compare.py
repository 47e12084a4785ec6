"""Compare two files of one benchmark: the ratio of every figure that both have, new over old.

    python scripts/benchmarks/compare.py OLD.json NEW.json

A list of numbers is a figure with a spread (repeated runs, or median and range): medians are compared, and a figure is
marked where the ranges of the two files do not meet. Rows are the same where the entries that name them are the same.
"""

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path

# What a file says of the run itself, and not of what was measured.
ABOUT = ("arguments", "config", "machine", "row_keys", "versions")
# Arguments that change nothing that is measured.
HARMLESS = ("dir", "json", "plot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    old, new = read(args.old), read(args.new)
    for line in differences(old, new):
        print(line)
    keys = new.get("row_keys") or old.get("row_keys") or []
    before, after = figures(old, keys), figures(new, keys)
    both = [label for label in before if label in after]
    if not both:
        raise SystemExit(f"{args.old} and {args.new} have no figure in common")
    rows = [compare(label, before[label], after[label]) for label in both]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, *numbers, mark in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=False)]
        print("  ".join([label.ljust(widths[0]), *cells, mark]).rstrip())
    outside = sum(row[-1] == "*" for row in rows)
    print(f"{len(both)} figures; * outside the spread, as the ranges do not meet: {outside}")


def read(path: Path) -> dict:
    """Return what a file holds; a file that is no benchmark's ends the program with one line."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise SystemExit(f"{path} is not a benchmark's file")
    return content


def differences(old: dict, new: dict) -> list[str]:
    """Return a line for every setting, package and property of the machine that is not the same in both files."""
    lines = []
    for name in ("arguments", "machine", "versions"):
        here, there = old.get(name) or {}, new.get(name) or {}
        changed = [key for key in here if key in there and here[key] != there[key] and key not in HARMLESS]
        lines += [f"not the same {name}: {key} {here[key]} -> {there[key]}" for key in changed]
    return lines


def figures(content: dict, keys: list[str]) -> dict[str, list[float]]:
    """Return every number and list of numbers in a file, by a label that says what it is of.

    Args:
        keys: names of the entries of a row that say what it is of; texts always do.
    """
    found: dict[str, list[float]] = {}

    def walk(node: object, *path: str) -> None:
        if is_number(node):
            found[", ".join(path)] = [node]
        elif isinstance(node, dict):
            for name, value in node.items():
                walk(value, *path, name)
        elif isinstance(node, list) and node and all(map(is_number, node)):
            found[", ".join(path)] = node
        elif isinstance(node, list):
            seen: Counter = Counter()
            for row in node:
                title, rest = split(row, keys)
                seen[title] += 1
                # Rows that nothing else tells apart have a number.
                walk(rest, *path, title if title and seen[title] == 1 else f"{title} #{seen[title]}".strip())

    walk({name: value for name, value in content.items() if name not in ABOUT})
    return found


def split(row: object, keys: list[str]) -> tuple[str, object]:
    """Return what a row is of, and the rest of it."""
    if not isinstance(row, dict):
        return "", row
    names = [name for name, value in row.items() if name in keys or isinstance(value, str)]
    title = " ".join(str(row[name]) for name in names)
    return title, {name: value for name, value in row.items() if name not in names}


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def compare(label: str, old: list[float], new: list[float]) -> tuple[str, str, str, str, str]:
    """Return a figure's label, both medians with their ranges, the ratio, and a mark where the ranges do not meet."""
    before, after = statistics.median(old), statistics.median(new)
    ratio = f"{after / before:.3f}" if before else ("1.000" if before == after else "-")
    spread = len(old) > 1 or len(new) > 1
    outside = spread and (min(new) > max(old) or max(new) < min(old))
    return label, show(old), show(new), ratio, "*" if outside else ""


def show(values: list[float]) -> str:
    """Return the median, and the range if there is one."""
    middle = f"{statistics.median(values):.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.4g}-{max(values):.4g})"


if __name__ == "__main__":
    main()
