"""Passes within a memory budget: what is planned, and that the result is that of one pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import build
from support.short_memory import loader, squeeze, sums_of

import cap_hf.collection.plan as plan_module
import cap_hf.collection.solver as solver_module
from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.costs import Costs
from cap_hf.collection.fitting import least_bytes
from cap_hf.collection.forecast import Alike
from cap_hf.collection.plan import Plan, plan_passes
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
    recollected=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_a_plan_takes_every_target_once_and_stays_within_the_budget(
    available, size, sample, share, widest, prior, refits, recollected
):
    targets, processes = find_targets(build("ViT"), size), Processes()
    kept_of = {target.name: int(share * sample / len(targets)) for target in targets}
    costs = Costs(16, sample, sum(kept_of.values()), widest, model=10**5, kept_of=kept_of)
    refitting = least_bytes(widest) if refits else 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(solver_module, "BATCH_BYTES", 2**12)
        plan, more = (
            plan_passes(targets, size, bytes_, costs, processes, None, torch.float32, prior, refitting, recollected)
            for bytes_ in (available, 2 * available)
        )
    if plan is None:
        return
    assert plan.targets == targets
    pieces = [target for each in plan.passes for target in each]
    for target in targets:
        own = [each.part for each in pieces if each.name == target.name]
        # Only of what is collected anew a pass may have a part.
        assert own == [(number, len(own)) for number in range(len(own) if recollected else 1)]
    assert plan.needed <= available
    assert plan.needed >= refitting
    assert 1 <= plan.microbatch <= plan.step <= 16
    assert plan.microbatch in (1, plan.step) or plan.microbatch * widest <= plan_module.CACHED_BYTES
    for each in plan.passes:
        # Of all that is kept of a step's samples, a pass has that of its own targets.
        kept = sum(kept_of[target.name] for target in each) * plan.step * (plan.microbatch < plan.step)
        assert plan.needed >= sums_of(each, prior) + sample * plan.microbatch + kept
    assert bool(plan.spilled) or plan.recollects or len(plan.passes) == 1
    assert not (plan.spilled and recollected)
    if plan.recollects:
        weights = sum(target.weight.nbytes for target in targets)
        # New weights of each sparsity, those of the beginning, and the model twice; orders and losses.
        beside = (
            (recollected + 1) * weights
            + 2 * costs.model
            + sum(2 * target.weight.numel() + target.weight.nbytes for target in targets)
        )
        assert plan.needed >= beside + max(sums_of(each, prior) for each in plan.passes)
        assert plan.num_passes == 2 * len(plan.passes) - 1
    assert len(more.passes) <= len(plan.passes)


def test_a_pass_keeps_what_its_own_targets_need_of_a_step(monkeypatch):
    """What all targets of the model keep was taken for that of each pass, and left little room for its sums."""
    monkeypatch.setattr(solver_module, "BATCH_BYTES", 2**12)
    targets = find_targets(build("ViT"))

    def planned(samples: int, kept: int) -> Plan:
        kept_of = {target.name: kept for target in targets}
        costs = Costs(samples, 1000, 10**6, plan_module.CACHED_BYTES, model=10**4, kept_of=kept_of)
        return plan_passes(targets, "row", 400_000, costs, Processes(), recollected=1)

    assert planned(16, 100).step == 16
    # Larger batches are split before they cost passes.
    passes = [len(planned(samples, 10_000).passes) for samples in (1, 4, 16, 256)]
    assert passes == [passes[0]] * 4


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
    refitted, plain = (
        plan_passes(targets, "row", 10**13, wide, Processes(), refitting=each) for each in (least_bytes(10**9), 0)
    )
    assert plain.needed + least_bytes(10**9) // 2 < refitted.needed < 2 * least_bytes(10**9)
    patched = Costs(16, 1000, 10, 0, patches=10**9, held=10**9)
    assert plan_passes(targets, "row", 10**12, patched, Processes()).needed > base + 16 * 10**9


def test_on_a_device_batches_take_what_memory_is_left(monkeypatch):
    """56 blocks at a time, whatever the memory, left a GPU waiting for launches."""
    targets, costs = find_targets(build("ViT")), Costs(16, 1000, 10, 0)
    found = {}
    for kind in ("cpu", "meta"):
        for available in (5 * 10**8, 10**10):
            alike = Alike(1, torch.device(kind))
            found[kind, available] = plan_passes(targets, "row", available, costs, alike).batch_bytes
    assert found["cpu", 5 * 10**8] == found["cpu", 10**10] == solver_module.BATCH_BYTES
    assert found["meta", 10**10] > 10 * solver_module.BATCH_BYTES
    assert solver_module.COPIES * found["meta", 5 * 10**8] <= 5 * 10**8


def test_large_blocks_come_one_for_each_thread(monkeypatch):
    targets, costs = find_targets(build("ViT", hidden_size=64, intermediate_size=4096)), Costs(16, 1000, 10, 0)
    block = 8 * 4096**2
    assert block > solver_module.BATCH_BYTES
    for threads, available, blocks in ((1, 10**12, 1), (3, 10**12, 3), (8, 10**12, 8), (8, 10**11, 8)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        plan = plan_passes(targets, "row", available, costs, Processes())
        assert plan.batch_bytes == blocks * block
        assert plan.needed <= available
    # No more of them than a quarter of the memory holds.
    least = plan_passes(targets, "row", 10**12, costs, Processes()).needed - 7 * solver_module.COPIES * block
    assert plan_passes(targets, "row", least, costs, Processes()).batch_bytes < 2 * block


@pytest.mark.parametrize("recollected", [0, 1])
@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_larger_batches_cost_no_passes(monkeypatch, kind, recollected):
    """They take what is left once the passes are as few as can be."""
    targets, costs = find_targets(build("ViT", hidden_size=64, intermediate_size=2048)), Costs(16, 1000, 10, 0)
    alike = Alike(1, torch.device(kind))
    whole = plan_passes(targets, "row", 10**12, costs, alike)
    for share in (0.55, 0.65, 0.75):
        available = int(whole.sums * share) + 3 * 10**8
        found = []
        for threads, most in ((1, solver_module.DEVICE_BATCH_BYTES), (16, 2**40)):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            monkeypatch.setattr(solver_module, "MOST_DEVICE_BYTES", most)
            plan = plan_passes(targets, "row", available, costs, alike, recollected=recollected)
            assert plan.needed <= available
            found.append(plan)
        assert len(found[0].passes) == len(found[1].passes) > 1
        assert found[0].batch_bytes <= found[1].batch_bytes


def test_another_run_goes_through_memory_in_the_same_way():
    targets = find_targets(build("ViT"))
    before = Plan([targets[:3], targets[3:]], "row", 8, 2, spilled=100)
    now = Plan([targets], "row", 16, 16).like(before.to_dict(), lambda size: targets)
    assert now.to_dict() == before.to_dict()
    assert now.passes == before.passes
