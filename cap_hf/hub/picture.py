"""The card's picture: how sparse each layer is."""

from collections.abc import Sequence
from pathlib import Path

from cap_hf.extras import need

MAX_NAMES = 100


def draw_sparsity(names: Sequence[str], sparsities: Sequence[float], total: float, path: str | Path) -> None:
    """Draw one bar per layer, in the model's order from the top, and a line at the whole model's sparsity.

    Args:
        names: of the layers.
        sparsities: of the layers, in [0, 1].
        total: of all layers together.
        path: of the PNG file to write.
    """
    # Its first import may build a font cache for seconds, which only a card should wait for.
    need("matplotlib", "plots")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, min(40, 1.2 + 0.17 * len(names))), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    axes.barh(places, [100 * each for each in sparsities], height=0.8, color="#4c72b0")
    axes.axvline(100 * total, color="#c44e52", linewidth=1.2, label=f"all layers: {100 * total:.1f} %")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("weights that are 0, %")
    # parse_math would take a $ in a name for a formula.
    shown = places if len(names) <= MAX_NAMES else []
    axes.set_yticks(list(shown), [shorten(names[place]) for place in shown], fontsize=6, parse_math=False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def shorten(name: str, limit: int = 60) -> str:
    """Return the end of a name, where layers differ."""
    return name if len(name) <= limit else f"...{name[-limit:]}"
