"""What is noted down only where it is wanted, and only by the process that writes it."""

import json
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.commands import recording
from cap_hf.commands.recording import SHOWN, SHOWN_IN_ALL, Recorder, predicted


@pytest.fixture
def compressor():
    """A compressor that has pruned."""
    model = build("ViT")
    found = CAPCompressor(model, CAPConfig(num_grads=8)).collect(random_batches(model, 8))
    found.prune(0.5)
    return found


def test_nothing_is_noted_where_no_page_is_wanted(compressor, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "removal_curve", None)
    recorder = Recorder(False, "cap-hf prune", Accelerator())
    recorder.eliminated(compressor)
    recorder.measured_dense(None)
    recorder.measured("a", None, compressor.model)
    recorder.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_elimination_is_noted_once(compressor, monkeypatch):
    recorder = Recorder(True, "cap-hf prune", Accelerator())
    recorder.eliminated(compressor)
    curve = recorder.found["curve"]
    assert len(curve["sparsity"]) == 100
    assert recorder.found["spectra"]
    monkeypatch.setattr(recording, "removal_curve", None)
    recorder.eliminated(compressor)
    assert recorder.found["curve"] is curve


def test_another_process_notes_no_images_and_no_spectra(compressor):
    recorder = Recorder(True, "cap-hf prune", SimpleNamespace(is_main_process=False))
    recorder.eliminated(compressor)
    assert recorder.found["curve"]
    assert recorder.found["spectra"] == []


@pytest.mark.parametrize(("models", "count"), [(1, SHOWN), (3, SHOWN), (6, 12), (1000, 1)])
def test_many_models_share_the_images(models, count):
    recorder = Recorder(True, None, Accelerator(), models)
    assert recorder.count == count
    assert recorder.count * models <= max(SHOWN_IN_ALL, models)


def test_what_is_noted_is_bound_to_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "write_page", lambda folder: folder / "report.html")
    recorder = Recorder(True, "cap-hf prune", Accelerator())
    (tmp_path / "report.json").write_text("{}")
    recorder.write(tmp_path)
    noted = json.loads((tmp_path / "report" / "recorded.json").read_text())
    assert noted["report_sha256"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert noted["command"] == "cap-hf prune"


def test_what_is_no_classifier_predicts_nothing():
    assert predicted(None) is None
    assert predicted(SimpleNamespace(figures=None)) is None
