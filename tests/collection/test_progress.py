"""One bar for a whole job, and what it says of the time that is left."""

import typing

import pytest
from support.models import build, random_batches

import cap_hf.collection.progress as progress_module
from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.progress import Foreseen, Progress, format_seconds


class Bar:
    """What the bar was told."""

    made: typing.ClassVar[list["Bar"]] = []

    def __init__(self, total=None, disable=False, **_):
        self.total, self.disable, self.n, self.closed = total, disable, 0, False
        self.phases, self.postfixes = [], []
        self.made.append(self)

    def set_description(self, text, refresh):
        self.phases.append(text)

    def set_postfix_str(self, text, refresh):
        self.postfixes.append(text)

    def update(self, ticks):
        assert ticks >= 0
        self.n += ticks

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    """Every bar that is shown."""
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(progress_module.transformers_logging, "tqdm", Bar)
    return Bar.made


@pytest.mark.parametrize("disable", [False, True])
def test_one_bar_shows_phases_speed_and_ends_full(bars, disable):
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=16), disable_tqdm=disable, prunes=2)
    compressor.collect(random_batches(model, 8, sizes=(8, 8)))
    (bar,) = bars
    assert 0 < bar.n < bar.total
    compressor.prune(0.5)
    assert not bar.closed
    compressor.prune(0.9)
    assert bars == [bar]
    assert bar.closed
    assert bar.n == bar.total
    compressor.prune(0.6)
    (again,) = bars[1:]
    assert again.closed
    assert again.n == again.total
    assert bar.disable == disable
    assert bar.phases == ["Collecting", "Eliminating", "Reconstructing", "Reconstructing"]
    assert {text.split()[1] for text in bar.postfixes} == {"gradient/s,", "block/s,"}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


# Seconds that phases take, and by how much they were foreseen wrongly. Half of a collection's speed may come from what
# the caches held of the trial, and a solver's from blocks that are larger than those tried.
JOBS = {
    "one pass": ([("collecting", 600.0)], [("eliminating", 300.0), ("reconstructing", 20.0)], 1.0),
    "passes of unlike length": (
        [("collecting", 300.0), ("collecting", 900.0), ("collecting", 500.0)],
        [("eliminating", 1500.0), ("reconstructing", 100.0), ("reconstructing", 100.0)],
        1.0,
    ),
    "a collection three times as slow as foreseen": (
        [("collecting", 500.0)] * 4,
        [("eliminating", 400.0), ("reconstructing", 50.0)],
        3.0,
    ),
    "a collection four times as fast as foreseen": (
        [("collecting", 500.0)] * 2,
        [("eliminating", 300.0), ("reconstructing", 50.0)],
        0.25,
    ),
}


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("solver_error", [0.6, 1.0, 1.6])
def test_the_time_left_is_within_a_factor_of_two_after_a_tenth_of_the_work(bars, name, solver_error):
    collecting, solving, error = JOBS[name]
    clock = Clock()
    progress = Progress(disable=False, clock=clock)
    progress.start(
        [Foreseen(kind, seconds / error) for kind, seconds in collecting]
        + [Foreseen(kind, seconds / solver_error) for kind, seconds in solving]
    )
    total, wrong = sum(seconds for _, seconds in [*collecting, *solving]), []
    for kind, seconds in [*collecting, *solving]:
        phase = progress.phase(kind, "unit", 200)
        for _ in range(200):
            clock.now += seconds / 200
            phase(1)
            left = total - clock.now
            if 0.1 * total < clock.now and left > 0.02 * total and not left / 2 <= progress.remaining() <= 2 * left:
                wrong.append((round(clock.now), round(left), round(progress.remaining())))
        progress.end_phase()
    assert not wrong
    (bar,) = bars
    assert bar.closed


def test_work_that_an_earlier_run_has_done_is_no_speed(bars):
    clock = Clock()
    progress = Progress(disable=False, clock=clock)
    progress.start([Foreseen("collecting", 100.0)])
    phase = progress.phase("collecting", "gradient", 100)
    phase.skip(90)
    clock.now += 1
    phase(1)
    assert progress.remaining() == pytest.approx(9, rel=0.01)


def test_seconds_are_readable():
    assert [format_seconds(each) for each in (0.4, 59.6, 125, 3725)] == ["0:00", "1:00", "2:05", "1:02:05"]


def test_a_phase_that_nobody_foresaw_is_a_job_of_its_own(bars):
    """Its bar began almost full: what the job before it had taken was counted as its own."""
    clock = Clock()
    progress = Progress(disable=False, clock=clock)
    progress.start([Foreseen("collecting", 10.0)])
    phase = progress.phase("collecting", "gradient", 10)
    clock.now += 10
    phase(10)
    progress.end_phase()
    again = progress.phase("reconstructing", "block", 100)
    clock.now += 1
    again(10)
    assert 80 <= bars[1].n <= 120


def test_a_bar_that_is_closed_before_its_work_is_done_is_not_full(bars):
    """After Ctrl-C it said 100 %."""
    progress = Progress(disable=False)
    progress.phase("healing", "step", 10)(3)
    progress.close()
    (bar,) = bars
    assert bar.closed
    assert bar.n < bar.total
    progress.phase("healing", "step", 10)(10)
    progress.end_phase()
    assert bars[1].closed
    assert bars[1].n == bars[1].total
