"""What a run notes down for its page, and tells trackers, at the places where it is there to be had."""

import hashlib
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from cap_hf.checkpoints.atomic import write_json
from cap_hf.checkpoints.folder import REPORT_NAME
from cap_hf.collection.curves import removal_curve
from cap_hf.collection.spectra import spectra
from cap_hf.commands.evaluation import Evaluation
from cap_hf.compressor import CAPCompressor
from cap_hf.data.evaluation import AccuracyEvaluation
from cap_hf.data.gallery import changed_predictions
from cap_hf.outputs import label_names
from cap_hf.pages.page import write_page
from cap_hf.pages.runs import RECORD_FOLDER, RECORD_NAME
from cap_hf.report import Phases, PruneReport
from cap_hf.tracking import Tracker

# Images whose prediction changed: of one model, and of all models of a run.
SHOWN, SHOWN_IN_ALL = 24, 72


class Recorder:
    """Notes down what only a run itself can know; it is read by `cap-hf report`.

    Args:
        wanted: whether anything is to be noted; if not, nothing here does anything.
        command: as it was typed.
        accelerator: of the run.
        models: how many sparse models there will be.
    """

    def __init__(self, wanted: bool, command: str | None, accelerator: Accelerator, models: int = 1) -> None:
        self.wanted, self.main = wanted, accelerator.is_main_process
        self.count = min(SHOWN, max(1, SHOWN_IN_ALL // models))
        self.dense: Tensor | None = None
        self.found: dict[str, Any] = {"command": command, "curve": None, "spectra": [], "changed": {}, "absent": []}
        self.noted = False

    def eliminated(self, compressor: CAPCompressor) -> None:
        """Note what removals cost, and eigenvalues, once; every process calls it, after the first prune."""
        paths, config = compressor.paths, compressor.config
        if not self.wanted or paths is None or self.noted:
            return
        self.noted = True
        self.found["curve"] = removal_curve(paths, config)
        if self.main:
            self.found["spectra"] = spectra(paths)
        if self.found["curve"] is None:
            self.found["absent"].append(f"Elimination is not here: {config.nm} compares nothing between blocks.")
        if compressor.fisher is None:
            self.found["absent"].append(f"Fisher is not here: method {config.method} sums nothing.")
        elif paths.recollection is not None:
            self.found["absent"].append(
                "Fisher is not here: its sums did not fit into memory, were collected in several passes and not kept. "
                "More --max_memory, or a disk for --spill_dir, keeps them."
            )

    def measured_dense(self, evaluation: Evaluation | None) -> None:
        """Keep what the dense model predicts, right after it was measured."""
        self.dense = predicted(evaluation)

    def measured(self, name: str, evaluation: Evaluation | None, model: PreTrainedModel) -> None:
        """Note the images whose prediction has changed, right after a sparse model was measured.

        Args:
            name: of its checkpoint.
            evaluation: that has measured it; None where it was not.
            model: that was measured.
        """
        sparse = predicted(evaluation)
        if not self.wanted or not self.main:
            return
        if evaluation is None:
            self._lacks_changes("nothing was measured (--do_eval false).")
        elif sparse is None:
            self._lacks_changes("the model has no head, or the images no labels, so it predicts no classes.")
        elif self.dense is None:
            self._lacks_changes("there was no dense model to compare with: name it with --teacher_model_name_or_path.")
        else:
            names = label_names(model.config)
            self.found["changed"][name] = changed_predictions(evaluation.dataset, names, self.dense, sparse, self.count)

    def _lacks_changes(self, reason: str) -> None:
        line = f"Changed predictions are not here: {reason}"
        if line not in self.found["absent"]:
            self.found["absent"].append(line)

    def write(self, output: Path) -> None:
        """Write what was noted, and the page; the main process calls it once report.json is there."""
        if not self.wanted:
            return
        # Of this run and no other that wrote here before or after it.
        digest = hashlib.sha256((output / REPORT_NAME).read_bytes()).hexdigest()
        write_json(output / RECORD_FOLDER / RECORD_NAME, self.found | {"report_sha256": digest})
        print(f"The page is {write_page(output)}")


class Watch:
    """A recorder and trackers of a pruning run.

    Args:
        recorder: notes down for the page.
        tracker: tells trackers.
        phases: of the run.
    """

    def __init__(self, recorder: Recorder, tracker: Tracker, phases: Phases) -> None:
        self.recorder, self.tracker, self.phases = recorder, tracker, phases

    def measured_dense(self, sparsity: float, evaluation: Evaluation | None, metrics: dict | None) -> None:
        """Take what was measured of the dense model, whose sparsity need not be 0."""
        self.recorder.measured_dense(evaluation)
        self.tracker.measured(sparsity, metrics)

    def measured(
        self,
        name: str,
        compressor: CAPCompressor,
        evaluation: Evaluation | None,
        report: PruneReport,
        metrics: dict | None,
    ) -> None:
        """Take a sparse model as it will be saved; every process calls it.

        Args:
            name: of its checkpoint.
            compressor: that has pruned it.
            evaluation: that has measured it, if any.
            report: of its pruning.
            metrics: what was measured.
        """
        self.recorder.eliminated(compressor)
        self.recorder.measured(name, evaluation, compressor.model)
        self.tracker.pruned(report, compressor.targets)
        self.tracker.measured(report.sparsity, metrics)
        self.tracker.passed(self.phases.records)


def predicted(evaluation: Evaluation | None) -> Tensor | None:
    """Return the classes that the model measured last predicts; None where there are none."""
    if evaluation is None or not isinstance(evaluation.figures, AccuracyEvaluation):
        return None
    return evaluation.figures.predicted
