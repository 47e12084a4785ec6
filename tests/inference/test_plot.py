"""The benchmark's picture: one panel per setting, one bar per backend, rates per second."""

import matplotlib.figure
from support.inference import measurement

from cap_hf.inference.plot import draw_benchmark


def draw(found, path, monkeypatch):
    """Draw to a file, and return the figure as well."""
    figures = []
    save = matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    draw_benchmark(found, "a model, 90 % sparse", path)
    (figure,) = figures
    return figure


def test_every_setting_has_a_panel_and_every_backend_a_bar(tmp_path, monkeypatch):
    found = [
        measurement("dense", 0.5),
        measurement("sparse", 0.25, speedup=2.0),
        measurement("dense", 2.0, batch_size=8, threads=1),
    ]
    figure = draw(found, tmp_path / "plot.png", monkeypatch)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["batch 1, 2 threads", "batch 8, 1 thread"]
    assert [bar.get_width() for bar in first.patches] == [2.0, 4.0]
    assert [bar.get_width() for bar in second.patches] == [4.0]
    assert [label.get_text() for label in first.texts] == [" 1.00x", " 2.00x"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"images per second"}
    # Sparse backends have a colour of their own.
    assert first.patches[0].get_facecolor() != first.patches[1].get_facecolor()


def test_the_line_reaches_from_quartile_to_quartile(tmp_path, monkeypatch):
    figure = draw([measurement("dense", 0.5, low=0.25, high=1.0)], tmp_path / "plot.png", monkeypatch)
    (axes,) = figure.axes
    ((line,),) = [container.lines[2] for container in axes.containers if hasattr(container, "lines")]
    ((low, high),) = [(segment[0][0], segment[1][0]) for segment in line.get_segments()]
    assert (low, high) == (1.0, 4.0)
