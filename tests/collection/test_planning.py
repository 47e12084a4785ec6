"""What is planned where memory is short, and that the result is that of one pass."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from support.models import ARCHITECTURES, build, random_batches
from support.short_memory import loader, squeeze

import cap_hf.collection.collection as collection_module
import cap_hf.collection.passes as passes_module
import cap_hf.collection.planning as planning_module
from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.collection import room
from cap_hf.collection.costs import measure
from cap_hf.collection.parts import parts_of
from cap_hf.collection.plan import Plan
from cap_hf.collection.planning import BLOCK_SIZES, automatic_sizes
from cap_hf.collection.resources import Resources
from cap_hf.collection.solver import work_of
from cap_hf.targets import find_targets


# Of the bytes of all sums: sums go to the disk, are collected anew, or so in parts of the largest targets.
@pytest.mark.parametrize(("short", "anew", "in_parts"), [(0.7, False, False), (0.9, True, False), (0.65, True, True)])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("fisher_loss", ["labels", "sampled", "features"])
def test_several_passes_equal_one(monkeypatch, tmp_path, shuffle, fisher_loss, short, anew, in_parts):
    results = []
    for fraction in (100.0, short):
        model = build("ViT")
        squeeze(monkeypatch, fraction, anew, block_size="row")
        config = CAPConfig(num_grads=30, fisher_loss=fisher_loss)
        compressor = CAPCompressor(model, config, resources=Resources(spill_dir=str(tmp_path)))
        compressor.collect(loader(model, batch_size=7, shuffle=shuffle))
        found = []
        for sparsity in (0.5, 0.9, 0.5):
            compressor.prune(sparsity)
            found.append({key: value.clone() for key, value in model.state_dict().items()})
        results.append((len(compressor.plan.passes), found))
        assert compressor.plan.recollects == (anew and fraction < 1)
        assert has_parts(compressor.plan) == (in_parts and fraction < 1)
        assert any(tmp_path.iterdir()) == bool(compressor.plan.spilled)
        del compressor
        assert not any(tmp_path.iterdir())
    assert results[0][0] == 1
    assert results[1][0] > 2
    for one, several in zip(results[0][1], results[1][1], strict=True):
        for name, value in one.items():
            assert torch.equal(value, several[name]), name


def has_parts(plan: Plan) -> bool:
    """Whether a pass has a part of a target."""
    return any(target.part != (0, 1) for each in plan.passes for target in each)


# Blocks of several rows, of one, and of a part of one.
@pytest.mark.parametrize("block_size", [64, "row", 4])
@pytest.mark.parametrize("fisher_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["Swin", "ConvNext", "ResNet"])
def test_parts_of_layers_equal_whole_ones(monkeypatch, name, fisher_dtype, block_size):
    make_plan, found, damps = planning_module.make_plan, [], []

    def in_parts(*args) -> Plan:
        plan = make_plan(*args)
        # Of a layer with fewer chunks some of these are empty.
        passes = [[part] for target in plan.targets for part in parts_of(target, 3)]
        return replace(plan, passes=passes, recollects=True)

    for plan in (make_plan, in_parts):
        monkeypatch.setattr(collection_module, "make_plan", plan)
        model = build(name)
        config = CAPConfig(num_grads=12, fisher_block_size=block_size, fisher_dtype=fisher_dtype)
        compressor = CAPCompressor(model, config).collect(random_batches(model, ARCHITECTURES[name][1], sizes=(5, 7)))
        losses = [layer.loss for sparsity in (0.5, 0.8) for layer in compressor.prune(sparsity).layers]
        found.append({key: value.clone() for key, value in model.state_dict().items()})
        damps.append((compressor.fisher.damps, losses))
    assert damps[0][0] == damps[1][0]
    assert damps[0][1] == pytest.approx(damps[1][1], rel=1e-12)
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def test_batches_that_come_once_serve_one_pass_only(monkeypatch):
    model = build("ViT")
    batches = random_batches(model, 8, sizes=(8, 8))
    compressor = CAPCompressor(model, CAPConfig(num_grads=16)).collect(iter(batches))
    assert compressor.fisher.count == 16
    squeeze(monkeypatch, 1.2, block_size="row")
    with pytest.raises(CAPError, match="passes need the examples again"):
        CAPCompressor(model, CAPConfig(num_grads=16, fisher_block_size="row")).collect(iter(batches))


def test_too_little_memory_names_a_block_size(monkeypatch):
    model = build("ViT")
    squeeze(monkeypatch, 0.5, block_size=512)
    batches = random_batches(model, 8)
    with pytest.raises(
        CAPError, match=r"fisher_block_size=512 .* do.*in 1 pass: --fisher_block_size (row|\d+) would do"
    ):
        CAPCompressor(model, CAPConfig(fisher_block_size=512), resources=Resources(max_passes=1)).collect(batches)
    monkeypatch.setattr(planning_module, "available_bytes", lambda *_: 1000)
    with pytest.raises(CAPError, match=r"any Fisher .* does not fit .*--include"):
        CAPCompressor(model, CAPConfig(fisher_block_size="auto")).collect(batches)


def test_auto_takes_the_largest_blocks_that_fit(monkeypatch):
    model = build("ViT")
    batches = random_batches(model, 8, sizes=(8, 8))
    found = {}
    for fraction in (4.0, 1.22):
        for passes in (1, 8):
            squeeze(monkeypatch, fraction, block_size="row")
            config, resources = CAPConfig(num_grads=16, fisher_block_size="auto"), Resources(max_passes=passes)
            compressor = CAPCompressor(model, config, resources=resources).collect(batches)
            found[fraction, passes] = max(target.block_size for target in compressor.targets)
            assert len(compressor.plan.passes) <= passes
            compressor.prune(0.5)
    assert found[4.0, 1] == found[1.22, 8] == 32
    assert found[1.22, 1] < 32


def test_a_full_disk_is_said_before_the_start(monkeypatch):
    model = build("ViT")
    squeeze(monkeypatch, 1.2, block_size="row")
    usage = room.shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda *_: usage)
    with pytest.raises(CAPError, match=r"passes keep .* in .*, where 10 bytes are free: name another .*--spill_dir"):
        CAPCompressor(model, CAPConfig(num_grads=16)).collect(random_batches(model, 8, sizes=(8, 8)))


def test_the_plan_is_said(monkeypatch, capsys):
    model = build("ViT")
    squeeze(monkeypatch, 1.2, block_size="row")
    for disable in (False, True):
        config = CAPConfig(num_grads=16, fisher_block_size="row")
        compressor = CAPCompressor(model, config, disable_tqdm=disable)
        compressor.collect(random_batches(model, 8, sizes=(8, 8)))
        said = capsys.readouterr().err
        assert ("passes over the examples" in said) != disable
        assert ("blocks of a row" in said) != disable


def test_blocks_are_as_large_as_memory_and_time_allow(monkeypatch):
    """Whole rows where their elimination is cheap, USUAL_SIZE or less where it is not; several passes at the last."""
    find = partial(find_targets, build("ViT"))
    assert automatic_sizes(find) == list(BLOCK_SIZES)
    monkeypatch.setattr(planning_module, "USUAL_SIZE", 16)
    rows = sum(work_of(target, target.num_blocks) for target in find("row"))
    monkeypatch.setattr(planning_module, "MOST_WORK", rows - 1)
    assert automatic_sizes(find) == [16]
    monkeypatch.setattr(planning_module, "MOST_WORK", rows)
    assert automatic_sizes(find)[0] == "row"

    model, batches = build("ViT"), random_batches(build("ViT"), 8, sizes=(8, 8))
    squeeze(monkeypatch, 1.2, block_size="row")
    small = CAPCompressor(model, CAPConfig(num_grads=16)).collect(batches).plan
    assert (len(small.passes), small.block_size) == (1, 16)
    squeeze(monkeypatch, 1.2, block_size=16)
    spilled = CAPCompressor(model, CAPConfig(num_grads=16)).collect(batches).plan
    assert len(spilled.passes) > 1


def test_what_may_not_or_cannot_go_to_the_disk_is_collected_anew(monkeypatch, tmp_path):
    model, batches = build("ViT"), random_batches(build("ViT"), 8, sizes=(8, 8))

    def recollects(**resources) -> bool:
        return (
            CAPCompressor(model, CAPConfig(num_grads=16), resources=Resources(**resources))
            .collect(batches)
            .plan.recollects
        )

    squeeze(monkeypatch, 1.0, block_size="row")
    assert not recollects()
    assert recollects(spill_dir="none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    assert recollects(spill_dir=str(tmp_path / "file"))
    with monkeypatch.context() as patch:
        patch.setattr(planning_module, "disk_seconds", lambda folder: (_ for _ in ()).throw(CAPError("read-only")))
        assert recollects()
    usage = room.shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda *_: usage)
    assert recollects()


@pytest.mark.parametrize(("seconds", "anew"), [(1e-3, True), (1e-15, False)])
def test_the_cheaper_way_is_taken(monkeypatch, seconds, anew):
    model = build("ViT")
    before = planning_module.extra_seconds
    squeeze(monkeypatch, 1.0, block_size="row")
    monkeypatch.setattr(planning_module, "extra_seconds", before)
    monkeypatch.setattr(planning_module, "disk_seconds", lambda folder: seconds)
    compressor = CAPCompressor(model, CAPConfig(num_grads=16)).collect(random_batches(model, 8, sizes=(8, 8)))
    assert compressor.plan.recollects == anew


@pytest.mark.parametrize("kept", [False, True])
def test_states_are_kept_where_that_saves_time(monkeypatch, kept):
    """Not where the model takes no time."""
    before = planning_module.extra_seconds
    model, batches = build("ViT"), random_batches(build("ViT"), 8, sizes=(8, 8))
    squeeze(monkeypatch, 1.0, block_size="row")
    monkeypatch.setattr(planning_module, "extra_seconds", before)

    def measured(*args):
        return replace(measure(*args), **{"seconds": float(kept)})

    monkeypatch.setattr(collection_module, "measure", measured)
    config = CAPConfig(num_grads=16, fisher_block_size="row")
    plan = CAPCompressor(model, config, resources=Resources(spill_dir="none")).collect(batches).plan
    assert plan.recollects
    assert plan.keeps == kept
    assert plan.needed <= plan.available
    assert Plan.like(plan, plan.to_dict(), lambda size: find_targets(model, block_size=size)).keeps == kept


def test_more_gradients_leave_no_room_for_states(monkeypatch):
    model, batches = build("ViT"), random_batches(build("ViT"), 8, sizes=(8, 8))
    squeeze(monkeypatch, 1.0, block_size="row")
    monkeypatch.setattr(planning_module, "extra_seconds", lambda plan, *_: float(not plan.keeps))
    nothing = Resources(spill_dir="none")
    few, many = (
        CAPCompressor(model, CAPConfig(num_grads=count, fisher_block_size="row"), resources=nothing)
        .collect(batches)
        .plan
        for count in (16, 10**6)
    )
    assert few.keeps
    assert not many.keeps


def test_a_search_counts_the_passes_of_each_try(monkeypatch):
    """With the disk it reads sums again; without it goes through the examples again, and a limit holds for these."""
    model, batches = build("ViT"), random_batches(build("ViT"), 8, sizes=(8, 8))
    squeeze(monkeypatch, 0.9, anew=True, block_size="row")
    config, counted = CAPConfig(num_grads=16, fisher_block_size="row"), []
    passes = passes_module.Passes.collect
    monkeypatch.setattr(passes_module.Passes, "collect", lambda *args: counted.append(1) or passes(*args))
    compressor = CAPCompressor(model, config, resources=Resources(spill_dir="none"))
    compressor.afterwards = replace(compressor.afterwards, rounds=2)
    (forecast,) = compressor.forecast(batches, (1,))
    planned = compressor.collect(batches).plan.num_passes
    search = compressor.find_sparsity(lambda model: 1.0, 0.5, step=0.3, max_evaluations=2)
    assert len(search.evaluations) == 2
    assert len(counted) == planned == forecast.plan.num_passes == 3 * len(compressor.plan.passes) - 1
    few = CAPCompressor(model, config, resources=Resources(max_passes=planned - 1, spill_dir="none"))
    few.afterwards = compressor.afterwards
    with pytest.raises(CAPError, match=f"--max_passes {planned} would do"):
        few.collect(batches)


def test_a_limit_of_passes_counts_all_of_them(monkeypatch):
    model, batches = build("ViT"), random_batches(build("ViT"), 8, sizes=(8, 8))
    squeeze(monkeypatch, 0.9, anew=True, block_size="row")
    config = CAPConfig(num_grads=16, fisher_block_size="row")
    free = CAPCompressor(model, config, resources=Resources(spill_dir="none")).collect(batches).plan
    assert free.num_passes == 2 * len(free.passes) - 1 > 1
    enough = Resources(max_passes=free.num_passes, spill_dir="none")
    assert CAPCompressor(model, config, resources=enough).collect(batches).plan.num_passes == free.num_passes
    less = Resources(max_passes=free.num_passes - 1, spill_dir="none")
    with pytest.raises(CAPError, match=f"--max_passes {free.num_passes} would do"):
        CAPCompressor(model, config, resources=less).collect(batches)


def test_a_refit_that_does_not_fit_is_named(monkeypatch):
    model, batches = build("ViT"), random_batches(build("ViT"), 8, sizes=(8, 8))
    squeeze(monkeypatch, 0.9, block_size="row")
    monkeypatch.setattr("cap_hf.collection.fitting.LEAST", 1000)
    config = CAPConfig(num_grads=16, fisher_block_size="row")
    CAPCompressor(model, config).collect(batches)
    with pytest.raises(CAPError, match="does not fit into .*: it would with --refit false"):
        CAPCompressor(model, config, refits=True).collect(batches)
    with pytest.raises(CAPError, match="prunes=0 must be at least 1"):
        CAPCompressor(model, config, prunes=0)
