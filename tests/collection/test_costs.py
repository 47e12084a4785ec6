"""One bar for a whole prune."""

import typing

import pytest
from support.models import build, random_batches

import cap_hf.collection.costs as costs_module
from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.costs import Progress


class Bar:
    """What the bar was told."""

    made: typing.ClassVar[list["Bar"]] = []

    def __init__(self, total=None, disable=False, **_):
        self.total, self.disable, self.done, self.closed = total, disable, 0.0, False
        self.phases, self.postfixes = [], []
        self.made.append(self)

    def set_description(self, text, refresh):
        self.phases.append(text)

    def set_postfix_str(self, text, refresh):
        self.postfixes.append(text)

    def update(self, work):
        self.done += work

    def close(self):
        self.closed = True


@pytest.mark.parametrize("disable", [False, True])
def test_one_bar_shows_phases_speed_and_ends_full(monkeypatch, disable):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(costs_module.transformers_logging, "tqdm", Bar)
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=16), disable_tqdm=disable, prunes=2)
    compressor.collect(random_batches(model, 8, sizes=(8, 8)))
    (bar,) = Bar.made
    collected = bar.done
    assert 0 < collected < bar.total
    compressor.prune(0.5)
    assert not bar.closed
    compressor.prune(0.9)
    assert Bar.made == [bar]
    assert bar.closed
    compressor.prune(0.6)
    (again,) = Bar.made[1:]
    assert again.closed
    assert again.done == pytest.approx(again.total)
    assert bar.disable == disable
    assert bar.phases == ["Collecting", "Eliminating", "Reconstructing", "Reconstructing"]
    assert bar.done == pytest.approx(bar.total, rel=1e-6)
    assert {text.split()[1] for text in bar.postfixes} == {"gradient/s", "block/s"}


def test_the_time_left_follows_the_work(monkeypatch):
    """Larger blocks take a larger part of the bar for solving."""
    monkeypatch.setattr(costs_module.transformers_logging, "tqdm", Bar)
    shares = []
    for size in (8, 32):
        model = build("ViT")
        progress = Progress(disable=False)
        targets = CAPCompressor(model, CAPConfig(fisher_block_size=size)).targets
        progress.start(targets, 1e6, 1)
        shares.append(1e6 / progress.bar.total)
    assert shares[1] < shares[0]
