"""`cap-hf <command>`: finds the subcommand and turns what goes wrong into one line and an exit code."""

import importlib
import logging
import signal
import sys

from cap_hf.errors import CAPError

COMMANDS = {
    "demo": "train a small ViT on the embedded digits, prune it with every method, print one table",
    "prune": "prune a checkpoint to one or several sparsities",
    "finetune": "recover a sparse checkpoint's accuracy, or prune it gradually, with every zero held",
    "evaluate": "measure the accuracy of a checkpoint",
    "inspect": "show the targets of a checkpoint and how sparse they are",
    "compress": "store a pruned checkpoint in few bytes",
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
    """Run a subcommand; return 0 only when its work is done."""
    logging.getLogger("torchao").addFilter(is_worth_a_line)
    logging.getLogger("torch.utils._pytree").addFilter(is_worth_a_line)
    try:
        importlib.import_module(f"cap_hf.commands.{command}").main(argv)
    except CAPError as error:
        # In one piece: several processes may say something at the same time.
        sys.stderr.write(f"cap-hf {command}: {message(error)}\n")
        return 1
    except KeyboardInterrupt:
        print(f"cap-hf {command}: interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    return 0


def message(error: CAPError) -> str:
    """Return what an error says, on one line.

    From a worker of a DataLoader the message comes after the traceback in that process, and may be empty.
    """
    text = str(error).rpartition("cap_hf.errors.CAPError")[2].removeprefix(": ")
    return " ".join(text.split()) or "failed, and the error does not say why"


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
