"""A search for a sparsity finds what trying every multiple of the step does, and says how sure that is."""

import math

import numpy as np
import pytest
import torch
from support.launching import launch
from support.models import build, random_batches
from torch import nn

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.scores import Score
from cap_hf.collection.searching import remarks, sparsity_grid
from cap_hf.errors import CAPError
from cap_hf.report import Evaluated, SearchReport
from cap_hf.targets import find_targets

CONFIG = CAPConfig(num_grads=8, fisher_block_size=16, refit_examples=8)


def by_magnitude(model) -> CAPCompressor:
    return CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)


def minus_energy(model) -> float:
    """What magnitude pruning loses of the weights: it rises with the sparsity, and with nothing else."""
    return float(sum(target.weight.detach().double().square().sum() for target in find_targets(model)))


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model, expected: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("step", [0.025, 0.07, 0.3])
@pytest.mark.parametrize("share", [0.0005, 0.1, 0.45, 0.93])
def test_it_finds_what_trying_every_multiple_does(step, share):
    model = build("ViT")
    compressor, dense = by_magnitude(model), minus_energy(model)
    allowed, losses, weights = share * dense, {}, {}
    for number in range(1, math.ceil(1 / step)):
        if (sparsity := round(number * step, 9)) < 1:
            compressor.prune(sparsity)
            losses[sparsity], weights[sparsity] = dense - minus_energy(model), state(model)
    expected = max((sparsity for sparsity, lost in losses.items() if lost <= allowed), default=None)
    if expected is None:
        with pytest.raises(CAPError, match="even sparsity"):
            compressor.find_sparsity(minus_energy, allowed, step=step)
        return
    found = compressor.find_sparsity(minus_energy, allowed, step=step)
    assert found.sparsity == expected
    assert found.complete
    assert len(found.evaluations) <= len(losses).bit_length() <= 8
    for each in found.evaluations:
        assert each.drop == pytest.approx(losses[each.sparsity], rel=1e-12)
        assert each.kept == (each.drop <= allowed)
        assert each.score == pytest.approx(dense - each.drop)
    assert_state(model, weights[expected])
    assert compressor.report.requested_sparsity == expected
    above = [sparsity for sparsity in losses if sparsity > expected]
    assert found.refused is None if not above else found.refused.sparsity == min(above)


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_models_are_refitted_and_recalibrated_before_they_are_measured(name):
    model, side = build(name), {"ViT": 8, "ResNet": 16}[name]
    batches, (held,) = random_batches(model, side), random_batches(model, side, sizes=(20,), seed=1)
    norms = name == "ResNet"

    def evaluate(model) -> torch.Tensor:
        with torch.no_grad():
            return model(**held).logits.gather(1, held["labels"][:, None])[:, 0]

    compressor = CAPCompressor(model, CONFIG, disable_tqdm=True, refits=True).collect(batches)
    seen = []
    found = compressor.find_sparsity(evaluate, 0.1, batches, 0.1, recalibrates=norms, on_evaluation=seen.append)
    assert seen == found.evaluations
    assert found.recalibrated == ([key for key, each in model.named_modules() if isinstance(each, nn.BatchNorm2d)])
    assert found.num_examples == 20
    for each in [*found.evaluations, found.found]:
        alone = build(name)
        other = CAPCompressor(alone, CONFIG, disable_tqdm=True).collect(batches)
        dense = evaluate(alone)
        other.prune(each.sparsity)
        other.refit(batches)
        if norms:
            other.recalibrate_batch_norm(batches)
        differences = (dense.double() - evaluate(alone).double()).numpy()
        assert each.drop == pytest.approx(differences.mean(), rel=1e-12)
        # Paired: the spread of the differences, not of the two models.
        assert each.drop_se == pytest.approx(differences.std() / math.sqrt(20), rel=1e-12)
    assert_state(model, state(alone))


def test_the_dense_model_is_that_of_the_collection_whatever_was_pruned_since():
    model = build("ViT")
    compressor, dense = by_magnitude(model), minus_energy(model)
    compressor.prune(0.9)
    assert minus_energy(model) < 0.9 * dense
    assert compressor.find_sparsity(minus_energy, 0.1 * dense).dense == dense


def test_where_nothing_keeps_the_drop_the_model_is_dense_again():
    model = build("ViT")
    before, compressor = state(model), by_magnitude(model)
    with pytest.raises(CAPError, match=r"even sparsity 0.05 loses \d+.\d{4}, and 0 is allowed: allow more"):
        compressor.find_sparsity(minus_energy, 0, step=0.05)
    assert_state(model, before)
    with pytest.raises(CAPError, match="the lowest of 2 that were tried: allow more, or more evaluations"):
        compressor.find_sparsity(minus_energy, 0, step=0.05, max_evaluations=2)
    assert_state(model, before)
    # Nothing tells of a pruning that was taken back.
    assert compressor.report is None
    with pytest.raises(CAPError, match="nothing has been pruned yet"):
        compressor.refit(random_batches(model, 8))


@pytest.mark.parametrize("share", [0.33, 0.7])
def test_too_few_evaluations_end_lower_and_say_so(share, caplog):
    model = build("ViT")
    compressor, dense = by_magnitude(model), minus_energy(model)
    whole = compressor.find_sparsity(minus_energy, share * dense, step=0.025)
    few = compressor.find_sparsity(minus_energy, share * dense, step=0.025, max_evaluations=3)
    assert few.evaluations == [
        Evaluated(each.sparsity, each.score, each.drop, None, each.kept, done.seconds)
        for each, done in zip(whole.evaluations[:3], few.evaluations, strict=True)
    ]
    assert few.sparsity < whole.sparsity
    assert not few.complete
    (line,) = few.remarks
    assert line == caplog.messages[-1]
    assert line.startswith(f"3 evaluations were too few to try all multiples of 0.025 above {few.sparsity:g}: ")
    assert by_magnitude(build("ViT")).prune(few.sparsity).num_zeros == compressor.report.num_zeros


def test_a_sparse_model_is_not_searched_below_its_own_sparsity():
    model = build("ViT")
    compressor = by_magnitude(model)
    compressor.prune(0.8)
    again = by_magnitude(model)
    found = again.find_sparsity(minus_energy, 0.0, step=0.025)
    assert found.sparsity == 0.8
    assert min(each.sparsity for each in found.evaluations) >= 0.8
    assert list(sparsity_grid(0.3, again.targets)) == [3]
    with pytest.raises(CAPError, match=r"sparse already: no multiple of 0.7 below 1 is more"):
        sparsity_grid(0.7, again.targets)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.30001, 0.55])
def test_the_grid_is_what_can_be_pruned_to(share):
    model = build("ViT")
    compressor = by_magnitude(model)
    compressor.prune(share)
    possible = []
    for number in range(1, 20):
        try:
            compressor.config.check_sparsity(number / 20, compressor.paths.num_weights, compressor.report.num_zeros)
        except CAPError:
            continue
        possible.append(number)
    assert list(sparsity_grid(0.05, compressor.targets)) == possible


def test_a_score_may_have_an_error_of_its_own():
    model = build("ViT")
    compressor, dense = by_magnitude(model), minus_energy(model)
    found = compressor.find_sparsity(lambda model: Score(minus_energy(model), 3.0), 0.3 * dense)
    assert {each.drop_se for each in found.evaluations} == {math.hypot(3.0, 3.0)}
    assert found.num_examples is None


def search_of(max_drop: float, errors: tuple[float, float], images: int | None = 1000) -> SearchReport:
    found, refused = (
        Evaluated(sparsity, 0.0, 0.0, error, error == errors[0], 0.0)
        for sparsity, error in zip((0.5, 0.55), errors, strict=True)
    )
    return SearchReport(max_drop, 0.05, 0.9, images, [found, refused], 0.5, True)


def test_noise_is_named_with_the_images_that_would_tell():
    assert list(remarks(search_of(0.01, (0.004, 0.006)))) == []
    (line,) = remarks(search_of(0.003, (0.002, 0.005)))
    assert "The standard error of the drop, 0.0050, is larger than what is allowed, 0.003" in line
    wanted = int(line.split("about ")[1].split()[0])
    # With so many, what is allowed is two standard errors.
    assert 2 * 0.005 * math.sqrt(1000 / wanted) <= 0.003 < 2 * 0.005 * math.sqrt(1000 / (wanted - 1))
    for unknown in (search_of(0.003, (0.002, 0.005), None), search_of(0.0, (0.002, 0.005))):
        (line,) = remarks(unknown)
        assert line.endswith("the search goes by noise.")


def test_the_top_of_the_grid_is_named():
    model = build("ViT")
    found = by_magnitude(model).find_sparsity(lambda model: 0.0, 0.0, step=0.1)
    assert (found.sparsity, found.refused, found.complete) == (0.9, None, True)
    assert found.remarks == [
        "Sparsity 0.9 is the highest multiple of 0.1, and does not lose too much: a smaller step goes further."
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"max_drop": -0.1}, "max_drop=-0.1 must be a number of at least 0"),
        ({"max_drop": math.nan}, "max_drop=nan must be a number"),
        ({"max_drop": "0.1"}, "max_drop='0.1' must be a number"),
        ({"step": 0}, "step=0 must be at least 1e-06 and less than 1"),
        ({"step": 1.0}, "step=1.0 must be at least"),
        ({"max_evaluations": 0}, "max_evaluations=0 must be at least 1"),
        ({"max_evaluations": 1.5}, "max_evaluations=1.5 is of type float"),
        ({"recalibrates": True}, "pass a dataloader"),
        ({"recalibrates": True, "dataloader": iter([])}, "again and again"),
    ],
)
def test_what_makes_no_sense_is_said_before_any_work(arguments, line):
    def evaluate(model) -> float:
        raise AssertionError("too late")

    with pytest.raises(CAPError, match=line):
        by_magnitude(build("ViT")).find_sparsity(evaluate, **{"max_drop": 0.1} | arguments)


def test_a_search_needs_a_collection_and_more_than_one_sparsity():
    model = build("ViT")
    with pytest.raises(CAPError, match="call collect\\(dataloader\\) before find_sparsity"):
        CAPCompressor(model, CONFIG).find_sparsity(minus_energy, 0.1)
    with pytest.raises(CAPError, match="has one sparsity"):
        CAPCompressor(model, CAPConfig(method="magnitude", allocation="2:4")).find_sparsity(minus_energy, 0.1)
    refitting = CAPCompressor(model, CONFIG, disable_tqdm=True, refits=True).collect(random_batches(model, 8))
    with pytest.raises(CAPError, match="pass a dataloader"):
        refitting.find_sparsity(minus_energy, 0.1)


# Both processes prune, and score otherwise: what they decide must be the same.
DIFFERENT = """
import json, sys
import torch
from accelerate import Accelerator
from support.models import build
from cap_hf import CAPCompressor, CAPConfig
from cap_hf.targets import find_targets

accelerator, model = Accelerator(cpu=True), build("ViT")
factor = 1.0 if accelerator.is_main_process else 5.0

def evaluate(model):
    return factor * float(sum(target.weight.double().square().sum() for target in find_targets(model)))

dense = evaluate(model) / factor
compressor = CAPCompressor(model, CAPConfig(method="magnitude"), accelerator, disable_tqdm=True)
found = compressor.find_sparsity(evaluate, 0.3 * dense)
with open(f"{sys.argv[1]}-{accelerator.process_index}.json", "w") as file:
    json.dump([found.sparsity, [each.sparsity for each in found.evaluations], compressor.report.num_zeros], file)
"""


def test_several_processes_decide_as_the_first_one_does(tmp_path):
    (tmp_path / "script.py").write_text(DIFFERENT)
    launch(2, str(tmp_path / "found"), script=tmp_path / "script.py")
    model = build("ViT")
    compressor, dense = by_magnitude(model), minus_energy(model)
    alone = compressor.find_sparsity(minus_energy, 0.3 * dense)
    expected = [alone.sparsity, [each.sparsity for each in alone.evaluations], compressor.report.num_zeros]
    files = [(tmp_path / f"found-{rank}.json").read_text() for rank in (0, 1)]
    assert files[0] == files[1] == str(expected)
    assert np.isclose(alone.dense, dense)
