"""What a pruning run tells trackers, through accelerate: figures of each sparsity, of each phase, and masks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from cap_hf.report import PruneReport
from cap_hf.targets import Target

PROJECT = "cap_hf"
# wandb's own step only goes up, and what has a lower one is dropped: there the step is a figure of these names, by
# which the others are drawn.
SPARSITY, PHASE = "sparsity in thousandths", "phase"
AXES = {
    SPARSITY: ("sparsity", "loss", "sparsity/*", "loss/*", "measured/*", "mask/*"),
    PHASE: ("seconds/*", "peak_bytes/*"),
}
# Pixels of the longer side of a mask's picture.
SIDE = 128


class Tracker:
    """Tells the trackers of an accelerator how a run goes; without any it does nothing.

    The step of an entry is the sparsity in thousandths: 750 is 75 %.

    Args:
        accelerator: made with the trackers' names.
        name: of the run, where a tracker has names for them.
        settings: of the run; without tokens.
    """

    def __init__(self, accelerator: Accelerator, name: str, settings: Mapping[str, Any]) -> None:
        self.accelerator, self.phases = accelerator, 0
        self.on = bool(accelerator.log_with)
        if self.on:
            names = {"trackio": {"name": name}, "wandb": {"name": name}}
            accelerator.init_trackers(PROJECT, flat(settings), names)
            for tracker in accelerator.trackers if accelerator.is_main_process else ():
                if tracker.name == "wandb":
                    for axis, figures in AXES.items():
                        for figure in figures:
                            tracker.tracker.define_metric(figure, step_metric=axis)

    def measured(self, sparsity: float, metrics: Mapping[str, float] | None) -> None:
        """Log what was measured of a model, such as its accuracy; also of the dense one, at its own sparsity."""
        self._log({f"measured/{name}": value for name, value in (metrics or {}).items()}, sparsity)

    def pruned(self, report: PruneReport, targets: Sequence[Target]) -> None:
        """Log a pruned model: its sparsity and loss, those of every layer, and the masks where images are taken."""
        if not self.on:
            return
        values: dict[str, Any] = {"sparsity": report.sparsity, "loss": report.loss}
        for layer in report.layers:
            values |= {f"sparsity/{layer.name}": layer.sparsity, f"loss/{layer.name}": layer.loss}
        self._log(values, report.sparsity)
        self._log_masks(targets, step_of(report.sparsity))

    def passed(self, phases: Sequence[Mapping[str, Any]]) -> None:
        """Log the seconds and peak bytes of the phases that have come since the last call, one step each."""
        for place in range(self.phases, len(phases)):
            record = phases[place]
            values = {f"seconds/{record['phase']}": record["seconds"]}
            values |= {
                f"peak_bytes/{kind}/{record['phase']}": size for kind, size in record["peak_memory_bytes"].items()
            }
            self._tell(values, PHASE, place)
        self.phases = len(phases)

    def _log(self, values: Mapping[str, Any], sparsity: float) -> None:
        known = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if known:
            self._tell(known, SPARSITY, step_of(sparsity))

    def _tell(self, values: Mapping[str, float], axis: str, step: int) -> None:
        for tracker in self.accelerator.trackers if self.on else ():
            if tracker.name == "wandb":
                tracker.log({**values, axis: step})
            else:
                tracker.log(dict(values), step=step)

    def _log_masks(self, targets: Iterable[Target], step: int) -> None:
        takers = [tracker for tracker in self.accelerator.trackers if hasattr(tracker, "log_images")]
        if not takers:
            return
        for target in targets:
            picture = density(target.weight.detach())[None, :, :, None].repeat(3, axis=3)
            for tracker in takers:
                # With wandb the figure of the step, which was told before, goes with it.
                how: dict[str, Any] = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                how |= {} if tracker.name == "wandb" else {"step": step}
                tracker.log_images({f"mask/{target.name}": picture}, **how)


def step_of(sparsity: float) -> int:
    """Return a sparsity in thousandths."""
    return round(1000 * sparsity)


def density(weight: torch.Tensor) -> np.ndarray:
    """Return a picture of a mask, `(h, w)` uint8: white where all weights are kept, black where none is.

    Rows are outputs, columns inputs; a side of more than 128 is averaged down to that.
    """
    kept = (weight != 0).flatten(1).float()[None, None]
    rows, columns = (min(SIDE, size) for size in kept.shape[2:])
    return (255 * F.adaptive_avg_pool2d(kept, (rows, columns))[0, 0]).round().to(torch.uint8).cpu().numpy()


def flat(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return settings as every tracker takes them: lists as text, and nothing that is None."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        if isinstance(value, (str, int, float, bool)):
            found[name] = value
    return found
