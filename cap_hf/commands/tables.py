"""Plain text tables: what a command prints of its results."""

from collections.abc import Mapping, Sequence
from typing import Any

from cap_hf.checkpoints.metrics import measured_in

# Name of a model, share of its target weights that are 0, what was measured of it.
Row = tuple[str, float | None, Mapping[str, Any] | None]


def results_table(
    rows: Sequence[Row],
    dense: Mapping[str, Any] | None,
    shares: Mapping[str, Sequence[float | None]] | None = None,
) -> str:
    """Return one line per model: its sparsity, what was measured of any of them, and what it lost to the dense model.

    Behind ± stand the standard errors of an accuracy and of its drop; those of other figures would make lines too long.

    Args:
        rows: in the order they are printed in; what was not measured of one of them is a dash.
        dense: metrics of the dense model, or None where it was not evaluated; its own row has no drop.
        shares: further columns by their heading, of each row a share, such as those of a budget.
    """
    header, lines = ["model"], [[name] for name, _, _ in rows]
    if any(sparsity is not None for _, sparsity, _ in rows):
        header.append("sparsity %")
        lines = [[name, percent(sparsity)] for name, sparsity, _ in rows]
    for heading, column in (shares or {}).items():
        header.append(heading)
        lines = [[*line, percent(share)] for line, share in zip(lines, column, strict=True)]
    for metric in measured_in(measured for _, _, measured in rows):
        header += [metric.heading, "drop"] if metric.drop and dense is not None else [metric.heading]
        for line, (_, _, measured) in zip(lines, rows, strict=True):
            line.append(metric.show(measured, error=metric.drop))
            if metric.drop and dense is not None:
                line.append(metric.show_drop(measured, dense))
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
