"""Plain text tables: what a command prints of its results."""

from collections.abc import Mapping, Sequence

# Name of a model, share of its target weights that are 0, what `evaluate_model` says of it.
Row = tuple[str, float | None, Mapping[str, float] | None]


def results_table(rows: Sequence[Row], dense: Mapping[str, float] | None) -> str:
    """Return one line per model: sparsity, accuracy, loss, and the drop of top-1 against the dense model.

    Args:
        rows: in the order they are printed in; what was not measured is a dash.
        dense: metrics of the dense model, or None where it was not evaluated; its own row has no drop.
    """
    header = ["model", "sparsity %", "top-1 %", "top-5 %", "loss", "drop"]
    lines = []
    for name, sparsity, metrics in rows:
        known = metrics or {}
        drop = None if dense is None or metrics is None or metrics is dense else dense["top1"] - metrics["top1"]
        lines.append(
            [
                name,
                percent(sparsity),
                percent(known.get("top1")),
                percent(known.get("top5")),
                f"{known['loss']:.4f}" if "loss" in known else "-",
                percent(drop),
            ]
        )
    return table(header, lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain text table; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(lines)


def percent(value: float | None, digits: int = 2) -> str:
    """Return a share as per cent: `0.875` -> `87.50`; None -> `-`."""
    return "-" if value is None else f"{100 * value:.{digits}f}"
