"""Passes within a memory budget: what is planned, and that the result is that of one pass."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import build, random_batches
from torch.utils.data import DataLoader

import cap_hf.collection.plan as plan_module
import cap_hf.collection.solver as solver_module
from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.collection import room
from cap_hf.collection.costs import Costs
from cap_hf.collection.fitting import least_bytes
from cap_hf.collection.plan import BLOCK_SIZES, Plan, automatic_sizes, plan_passes, sums_bytes
from cap_hf.collection.resources import Resources
from cap_hf.collection.shares import largest_shares
from cap_hf.collection.solver import work_of
from cap_hf.distributed.processes import Processes
from cap_hf.targets import find_targets


@given(
    available=st.integers(10**5, 10**9),
    size=st.sampled_from([4, 8, 16, 32]),
    sample=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    widest=st.sampled_from([0, 2**10, 2**21, 2**24]),
    prior=st.booleans(),
    refits=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_plan_takes_every_target_once_and_stays_within_the_budget(
    available, size, sample, share, widest, prior, refits
):
    targets, processes = find_targets(build("ViT"), size), Processes()
    costs = Costs(16, sample, int(share * sample), widest)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(solver_module, "BATCH_BYTES", 2**12)
        plan, more = (
            plan_passes(targets, size, bytes_, costs, processes, prior=prior, refits=refits)
            for bytes_ in (available, 2 * available)
        )
    if plan is None:
        return
    assert [target for each in plan.passes for target in each] == targets
    assert plan.needed <= available
    assert not refits or plan.needed >= least_bytes(widest)
    assert 1 <= plan.microbatch <= plan.step <= 16
    assert plan.microbatch in (1, plan.step) or plan.microbatch * widest <= plan_module.CACHED_BYTES
    held = sample * plan.microbatch + costs.kept * plan.step * (plan.microbatch < plan.step)
    assert plan.needed >= held
    for each in plan.passes:
        assert sums_of(each, prior) <= available
    assert bool(plan.spilled) or len(plan.passes) == 1
    assert len(more.passes) <= len(plan.passes)


def sums_of(targets, prior: bool = True) -> int:
    """Bytes of the sums of some targets, in one process."""
    return sum(
        sums_bytes(target, blocks, prior)
        for target, blocks in zip(targets, largest_shares(targets, Processes()), strict=True)
    )


def squeeze(monkeypatch, fraction: float, **sizes) -> None:
    """Let the plan find so much of the Fisher's bytes free, with small chunks beside them."""
    monkeypatch.setattr(solver_module, "BATCH_BYTES", 2**13)
    total = sums_of(find_targets(build("ViT"), **sizes))
    monkeypatch.setattr(plan_module, "available_bytes", lambda *_: int(total * fraction))


def loader(model, count: int = 30, **arguments) -> DataLoader:
    (batch,) = random_batches(model, 8, sizes=(count,))
    return DataLoader([{key: value[i] for key, value in batch.items()} for i in range(count)], **arguments)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("fisher_loss", ["labels", "sampled", "features"])
def test_several_passes_equal_one(monkeypatch, tmp_path, shuffle, fisher_loss):
    results = []
    for fraction in (100.0, 0.7):
        model = build("ViT")
        squeeze(monkeypatch, fraction, block_size="row")
        config = CAPConfig(num_grads=30, fisher_loss=fisher_loss)
        compressor = CAPCompressor(model, config, resources=Resources(spill_dir=str(tmp_path)))
        compressor.collect(loader(model, batch_size=7, shuffle=shuffle))
        found = []
        for sparsity in (0.5, 0.9, 0.5):
            compressor.prune(sparsity)
            found.append({key: value.clone() for key, value in model.state_dict().items()})
        results.append((len(compressor.plan.passes), found))
        del compressor
        assert not any(tmp_path.iterdir())
    assert results[0][0] == 1
    assert results[1][0] > 2
    for one, several in zip(results[0][1], results[1][1], strict=True):
        for name, value in one.items():
            assert torch.equal(value, several[name]), name


def test_larger_batches_are_split_where_memory_is_short(monkeypatch):
    model = build("ViT")
    squeeze(monkeypatch, 100.0, block_size="row")
    sums = []
    for bytes_ in (0, 2**21):
        monkeypatch.setattr("cap_hf.collection.collection.measure", lambda *_, bytes_=bytes_: Costs(16, bytes_))
        compressor = CAPCompressor(model, CAPConfig(num_grads=30)).collect(loader(model, batch_size=16))
        sums.append({name: each.full() for name, each in compressor.fisher.sums.items()})
        assert (compressor.plan.step < 16) == (bytes_ > 0)
    for name, value in sums[0].items():
        torch.testing.assert_close(value, sums[1][name], rtol=1e-4, atol=1e-7)


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
    monkeypatch.setattr(plan_module, "available_bytes", lambda *_: 1000)
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
    monkeypatch.setattr(plan_module, "USUAL_SIZE", 16)
    rows = sum(work_of(target, target.num_blocks) for target in find("row"))
    monkeypatch.setattr(plan_module, "MOST_WORK", rows - 1)
    assert automatic_sizes(find) == [16]
    monkeypatch.setattr(plan_module, "MOST_WORK", rows)
    assert automatic_sizes(find)[0] == "row"

    model, batches = build("ViT"), random_batches(build("ViT"), 8, sizes=(8, 8))
    squeeze(monkeypatch, 1.2, block_size="row")
    small = CAPCompressor(model, CAPConfig(num_grads=16)).collect(batches).plan
    assert (len(small.passes), small.block_size) == (1, 16)
    squeeze(monkeypatch, 1.2, block_size=16)
    spilled = CAPCompressor(model, CAPConfig(num_grads=16)).collect(batches).plan
    assert len(spilled.passes) > 1


def test_a_plan_counts_what_each_room_says(monkeypatch):
    """One pass takes sums, paths, and the larger of what collecting and solving say of themselves."""
    targets, costs = find_targets(build("ViT")), Costs(16, 1000, 10, 0)
    base = plan_passes(targets, "row", 10**12, costs, Processes()).needed
    for module in ("exchange", "solver"):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(plan_module, module), "peak_bytes", lambda *_: 10**11)
            assert plan_passes(targets, "row", 10**12, costs, Processes()).needed > base + 9 * 10**10, module
    inputs = sums_of(targets) - sums_of(targets, prior=False)
    # In float64 what a process has, in float32 what all have, of each input 16 or 32 wide a little more than half.
    assert 12 * (10 * 16**2 + 2 * 32**2) // 2 < inputs <= 12 * (10 * 16**2 + 2 * 32**2)
    assert plan_passes(targets, "row", 10**12, costs, Processes(), prior=True).needed == base + inputs
    wide = Costs(16, 1000, 10, 10**9)
    refitted, plain = (plan_passes(targets, "row", 10**13, wide, Processes(), refits=each) for each in (True, False))
    assert plain.needed + least_bytes(10**9) // 2 < refitted.needed < 2 * least_bytes(10**9)
    patched = Costs(16, 1000, 10, 0, patches=10**9, held=10**9)
    assert plan_passes(targets, "row", 10**12, patched, Processes()).needed > base + 16 * 10**9


def test_on_a_device_batches_take_what_memory_is_left(monkeypatch):
    """56 blocks at a time, whatever the memory, left a GPU waiting for launches."""
    targets, costs = find_targets(build("ViT")), Costs(16, 1000, 10, 0)
    found = {}
    for kind in ("cpu", "meta"):
        for target in targets:
            target.module.to(kind)
        for available in (5 * 10**8, 10**10):
            found[kind, available] = plan_passes(targets, "row", available, costs, Processes()).batch_bytes
    assert found["cpu", 5 * 10**8] == found["cpu", 10**10] == solver_module.BATCH_BYTES
    assert found["meta", 10**10] > 10 * solver_module.BATCH_BYTES
    assert solver_module.COPIES * found["meta", 5 * 10**8] <= 5 * 10**8


def test_another_run_goes_through_memory_in_the_same_way():
    targets = find_targets(build("ViT"))
    before = Plan([targets[:3], targets[3:]], "row", 8, 2, spilled=100)
    now = Plan([targets], "row", 16, 16).like(before.to_dict(), lambda size: targets)
    assert now.to_dict() == before.to_dict()
    assert now.passes == before.passes
