"""Draw what a benchmark measured: images per second of every backend."""

from collections.abc import Sequence
from pathlib import Path

from cap_hf.extras import need
from cap_hf.inference.benchmark import Measurement


def draw_benchmark(found: Sequence[Measurement], title: str, path: str | Path) -> None:
    """Write a PNG file with one panel per setting (batch size and threads) and one bar per backend, with its quartiles.

    Args:
        found: what was measured, at least one.
        title: above the panels.
        path: of the file.
    """
    # Its first import may build a font cache for seconds.
    need("matplotlib", "plots")
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((each.batch_size, each.threads) for each in found))
    names = list(dict.fromkeys(each.backend for each in found))
    figure = Figure(figsize=(8, 0.8 + len(settings) * (0.7 + 0.28 * len(names))), layout="constrained")
    figure.suptitle(title, fontsize=9, parse_math=False)
    for axes, (size, threads) in zip(figure.subplots(len(settings), squeeze=False)[:, 0], settings, strict=True):
        here = [each for each in found if (each.batch_size, each.threads) == (size, threads)]
        rates = [each.images_per_second for each in here]
        low = [rate - size / each.high_seconds for rate, each in zip(rates, here, strict=True)]
        high = [size / each.low_seconds - rate for rate, each in zip(rates, here, strict=True)]
        colors = ["#c44e52" if "sparse" in each.backend else "#4c72b0" for each in here]
        bars = axes.barh([each.backend for each in here], rates, color=colors, xerr=(low, high), ecolor="#333333")
        axes.bar_label(bars, [f" {each.speedup:.2f}x" for each in here], fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.tick_params(labelsize=7)
        axes.set_title(f"batch {size}, {threads} thread{'s' if threads > 1 else ''}", fontsize=8, loc="left")
        axes.set_xlabel("images per second", fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})
