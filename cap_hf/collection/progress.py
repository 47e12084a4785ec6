"""One bar for a whole job: the phase it is in, how fast that goes, and the time that is left."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

# Share of a phase after which its own speed is believed, and no longer what was foreseen.
BELIEVED = 0.05
# Parts that the bar is cut into.
TICKS = 1000


@dataclass
class Foreseen:
    """A phase that will come.

    Attributes:
        kind: phases of one kind that take longer than was foreseen let the others be taken to as well.
        seconds: how long it is expected to take.
    """

    kind: str
    seconds: float


class Progress:
    """Shows a bar whose remaining time is what is left of the phase by its own speed, and what is foreseen of the rest.

    Args:
        disable: show nothing.
        clock: of seconds.
    """

    def __init__(self, disable: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self.disable, self.clock = disable, clock
        self.bar: tqdm | None = None
        self._coming: list[Foreseen] = []
        self._done: list[tuple[Foreseen, float]] = []
        self._phase: Phase | None = None
        self._spent, self._shown = 0.0, 0

    def start(self, foreseen: Sequence[Foreseen]) -> None:
        """Begin a job of these phases, in this order."""
        self.close()
        self._coming, self._done, self._spent = list(foreseen), [], 0.0

    def phase(self, kind: str, unit: str, work: float, name: str | None = None, times: int = 1) -> "Phase":
        """Begin a phase.

        Args:
            kind: the next foreseen phase of it begins, and those before are taken to be over; a phase that was not
                foreseen makes a job of its own.
            unit: of what is counted.
            work: how much there is to do, in any measure.
            name: what the bar shows; `kind` if None.
            times: how many foreseen phases it is, done together.
        """
        self._end_phase()
        self.bar = self.bar or transformers_logging.tqdm(
            total=TICKS,
            delay=2,
            disable=self.disable,
            bar_format="{desc}{percentage:3.0f}% |{bar}| {elapsed}{postfix}",
        )
        seconds = 0.0
        for _ in range(times):
            if any(each.kind == kind for each in self._coming):
                while (coming := self._coming.pop(0)).kind != kind:
                    pass
                seconds += coming.seconds
        self.bar.set_description((name or kind).capitalize(), refresh=False)
        self._phase = Phase(self, Foreseen(kind, seconds), unit, work)
        return self._phase

    def remaining(self) -> float:
        """Return the seconds that are left of the job."""
        phase = self._phase
        left = sum(coming.seconds * self._factor(coming.kind) for coming in self._coming)
        return left if phase is None else left + phase.remaining(self._factor(phase.foreseen.kind))

    def _factor(self, kind: str) -> float:
        """Return how many times as long as foreseen phases of a kind have taken so far."""
        taken = [(each.seconds, seconds) for each, seconds in self._done if each.kind == kind and each.seconds]
        phase = self._phase
        if phase is not None and phase.foreseen.kind == kind and phase.share > BELIEVED and phase.foreseen.seconds:
            taken.append((phase.foreseen.seconds * phase.share, phase.seconds))
        return sum(seconds for _, seconds in taken) / sum(each for each, _ in taken) if taken else 1.0

    def show(self) -> None:
        """Bring the bar up to date."""
        if self.bar is None or self._phase is None:
            return
        left, phase = self.remaining(), self._phase
        spent = self._spent + phase.seconds
        share = spent / max(spent + left, 1e-9)
        self.bar.set_postfix_str(f"{phase.speed:.1f} {phase.unit}/s, {format_seconds(left)} left", refresh=False)
        self._fill(int(TICKS * share))

    def _fill(self, ticks: int) -> None:
        """Advance the bar to a tick; it never goes back, though what is left may turn out to be more."""
        if self.bar is not None and ticks > self._shown:
            self.bar.update(ticks - self._shown)
            # Counted here: where transformers' bars are switched off, theirs counts nothing.
            self._shown = ticks

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._done.append((self._phase.foreseen, self._phase.seconds))
            self._spent += self._phase.seconds
            self._phase = None

    def end_phase(self) -> None:
        """End the phase; after the last the bar is full and goes."""
        self._end_phase()
        if not self._coming:
            self._fill(TICKS)
            self.close()

    def say(self, text: str) -> None:
        """Print a line for whoever watches the bar."""
        if not self.disable:
            print(text, file=sys.stderr)

    def close(self) -> None:
        """Take the bar away as it is: work that was interrupted is not over."""
        self._end_phase()
        if self.bar is not None:
            self.bar.close()
            self.bar, self._shown = None, 0
        self._done, self._spent = [], 0.0


class Phase:
    """Takes from a loop how many units, and how much of the phase's work, it has done."""

    def __init__(self, progress: Progress, foreseen: Foreseen, unit: str, work: float) -> None:
        self.progress, self.foreseen, self.unit, self.work = progress, foreseen, unit, max(work, 1e-9)
        self.count, self.done = 0, 0.0
        self._skipped = 0.0
        self.begun = self.last = progress.clock()

    @property
    def seconds(self) -> float:
        """Return the seconds from its beginning to what was done last."""
        return self.last - self.begun

    @property
    def share(self) -> float:
        """Return the share of its work that is done, in [0, 1], not counting what was skipped."""
        return min(1.0, (self.done - self._skipped) / max(self.work - self._skipped, 1e-9))

    @property
    def speed(self) -> float:
        """Return how many units take a second."""
        return self.count / max(self.seconds, 1e-9)

    def remaining(self, factor: float) -> float:
        """Return the seconds that are left: by its own speed once that is known, before by what was foreseen."""
        expected = self.foreseen.seconds * factor * (1 - self.done / self.work)
        if not self.share:
            return max(0.0, expected)
        own = self.seconds * (1 - self.share) / self.share
        trust = 1.0 if not self.foreseen.seconds else min(1.0, self.share / BELIEVED)
        return max(0.0, trust * own + (1 - trust) * expected)

    def skip(self, work: float) -> None:
        """Count work that an earlier run has done."""
        self.done += work
        self._skipped += work
        self.progress.show()

    def __call__(self, count: int, work: float | None = None) -> None:
        """Count units that are done, and their work where it is not one per unit."""
        self.count += count
        self.done += count if work is None else work
        self.last = self.progress.clock()
        self.progress.show()


def format_seconds(seconds: float) -> str:
    """Return `1:02:03`, `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
