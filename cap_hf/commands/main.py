"""`cap-hf <command>`: finds the subcommand and turns what goes wrong into one line and an exit code."""

import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from cap_hf.errors import CAPError, ModelFailure, foreign_line, own_words

# Set to anything, an error is shown with where it was raised.
TRACEBACK = "CAP_HF_TRACEBACK"

COMMANDS = {
    "demo": "train a small ViT on the embedded digits, prune it with every method, print one table",
    "prune": "prune a checkpoint to one or several sparsities",
    "finetune": "recover a sparse checkpoint's accuracy, or prune it gradually, with every zero held",
    "evaluate": "measure the accuracy of a checkpoint",
    "report": "make one page of what was run into a folder: charts, tables, images",
    "inspect": "show the targets of a checkpoint and how sparse they are",
    "compress": "store a pruned checkpoint in few bytes",
    "convert": "make a plain checkpoint of what another library's pruning has written",
    "benchmark": "measure how fast a checkpoint runs, dense and sparse, in several runtimes",
    "push": "publish a checkpoint with a model card on the Hub",
}


def usage() -> str:
    """Return what `cap-hf --help` prints."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: cap-hf <command> [arguments]", "", *lines, "", "cap-hf <command> --help shows its arguments."]
    )


def run(command: str, argv: list[str]) -> int:
    """Run a subcommand, and say in one line what goes wrong; return 0 only when its work is done."""
    code, line = attempt(command, argv)
    if line is not None:
        # In one piece: several processes may say something at the same time.
        sys.stderr.write(f"{line}\n")
    return code


def attempt(command: str, argv: list[str], explain: Callable[[Exception], str] | None = None) -> tuple[int, str | None]:
    """Run a subcommand; return its exit code, and the one line to print where something went wrong.

    Args:
        command: one of `COMMANDS`.
        argv: its arguments.
        explain: says in one line what an error means, in the place of `message`.
    """
    logging.getLogger("torchao").addFilter(is_worth_a_line)
    logging.getLogger("torch.utils._pytree").addFilter(is_worth_a_line)
    try:
        importlib.import_module(f"cap_hf.commands.{command}").main(argv)
    except KeyboardInterrupt:
        return 130, f"cap-hf {command}: interrupted; nothing half-written was left"
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        return 1, f"cap-hf {command}: {(explain or message)(error)}"
    return 0, None


def message(error: Exception) -> str:
    """Return what went wrong, on one line: what a CAPError says, or what another library does and what to do."""
    shows = f" ({TRACEBACK}=1 shows where)"
    if isinstance(error, CAPError):
        # From a worker of a DataLoader it comes with the traceback there, and may say nothing.
        line = " ".join(own_words(str(error)).split()) or "failed, and the error does not say why"
        # A model that finds its images wrong says so with a ValueError; anything else may be a mistake in its code.
        in_code = isinstance(error, ModelFailure) and not isinstance(error.__cause__, (OSError, ValueError))
        return line + shows if in_code else line
    return foreign_line(error) + shows


def is_worth_a_line(record: logging.LogRecord) -> bool:
    """Return False for what torchao says of itself where transformers imports it: no command here needs those parts.

    These are libraries of its kernels that were built for another machine, and enumerations that it registers twice.
    """
    text = record.getMessage()
    return not (text.startswith("Failed to load") or "is an Enum subclass" in text)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cap-hf`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"cap-hf: there is no command {argv[0]!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # As by Ctrl-C, so that no temporary folder is left and nothing half-written.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(argv[0], argv[1:])
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
