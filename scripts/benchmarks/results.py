"""Report a benchmark while it runs: a bar that says what is measured, and a file that has every row there is."""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm

from cap_hf.checkpoints.atomic import write_json
from cap_hf.report import versions


class Results:
    """The figures of one run of a benchmark, in a file that is whole at any time; use it in a `with` statement.

    Args:
        args: of the command line, kept in the file; `args.json` is the file, or None for none.
        total: runs that the bar counts.
        keys: names of the entries that say what a row is of, such as `model`; compare.py finds equal rows by them.
        rows: of an earlier run that goes on, which come first in `results`.
    """

    def __init__(
        self, args: argparse.Namespace, total: int, keys: tuple[str, ...] = (), rows: Sequence[dict] = ()
    ) -> None:
        self.path = args.json
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        self.content: dict = {"arguments": arguments, "machine": machine(), "versions": versions()}
        self.content["row_keys"] = list(keys)
        if rows:
            self.content["results"] = list(rows)
        self.bar = tqdm(total=total, unit="run", dynamic_ncols=True)

    def __enter__(self) -> "Results":
        self._save()  # a path that cannot be written is an error now, not after an hour
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def measuring(self, what: str) -> None:
        """Show what is measured now."""
        self.bar.set_description(what)

    def advance(self, runs: int = 1) -> None:
        """Count runs that are over."""
        self.bar.update(runs)

    def add(self, row: dict, *path: str) -> None:
        """Append a row to the list at a path of the file (default: `results`), write the file, and print the row."""
        *outer, last = path or ("results",)
        place = self.content
        for name in outer:
            place = place.setdefault(name, {})
        place.setdefault(last, []).append(row)
        self._save()
        self.bar.write(json.dumps(row))

    def set(self, **entries: object) -> None:
        """Set entries at the top of the file, and write the file."""
        self.content |= entries
        self._save()

    def _save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content)


def machine() -> dict[str, object]:
    """Return what figures depend on besides the versions: system, processor, number of threads, and GPU."""
    found = {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
