"""Passes within a memory budget: what is planned, and that the result is that of one pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import build, random_batches
from torch.utils.data import DataLoader

import cap_hf.collection.plan as plan_module
import cap_hf.collection.solver as solver_module
from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.collection.costs import Costs, measure
from cap_hf.collection.examples import CalibrationExamples
from cap_hf.collection.plan import Resources, plan_passes, sums_bytes
from cap_hf.distributed.processes import Processes
from cap_hf.targets import find_targets


@pytest.mark.parametrize(
    ("text", "expected"), [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("4096", 4096)]
)
def test_memory_sizes(text, expected):
    assert Resources(max_memory=text).bytes == expected


@pytest.mark.parametrize("text", ["8 apples", "-1GB", "0GB", "GB"])
def test_memory_sizes_that_are_none(text):
    with pytest.raises(CAPError, match="is not a size such as 8GB"):
        Resources(max_memory=text)


@given(
    available=st.integers(10**5, 10**9),
    size=st.sampled_from([4, 8, 16, 32]),
    sample=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    widest=st.sampled_from([0, 2**10, 2**21, 2**24]),
)
@settings(max_examples=100, deadline=None)
def test_a_plan_takes_every_target_once_and_stays_within_the_budget(available, size, sample, share, widest):
    targets, processes = find_targets(build("ViT"), size), Processes()
    costs = Costs(16, sample, int(share * sample), widest)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(solver_module, "CHUNK_BYTES", 2**12)
        plan = plan_passes(targets, size, available, costs, processes)
        more = plan_passes(targets, size, 2 * available, costs, processes)
    if plan is None:
        return
    assert [target for each in plan.passes for target in each] == targets
    assert plan.needed <= available
    assert 1 <= plan.at_a_time <= plan.limit <= 16
    assert plan.at_a_time in (1, plan.limit) or plan.at_a_time * widest <= plan_module.CACHED_BYTES
    held = sample * plan.at_a_time + costs.kept * plan.limit * (plan.at_a_time < plan.limit)
    assert plan.needed >= held
    for each in plan.passes:
        assert sum(sums_bytes(target, processes) for target in each) <= available
    assert bool(plan.spilled) or len(plan.passes) == 1
    assert len(more.passes) <= len(plan.passes)


def squeeze(monkeypatch, fraction: float, **sizes) -> None:
    """Let the plan find so much of the Fisher's bytes free, with small chunks beside them."""
    monkeypatch.setattr(solver_module, "CHUNK_BYTES", 2**13)
    total = sum(sums_bytes(target, Processes()) for target in find_targets(build("ViT"), **sizes))
    monkeypatch.setattr(plan_module, "available_bytes", lambda *_: int(total * fraction))


def loader(model, count: int = 30, **arguments) -> DataLoader:
    (batch,) = random_batches(model, 8, sizes=(count,))
    return DataLoader([{key: value[i] for key, value in batch.items()} for i in range(count)], **arguments)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("fisher_type", ["empirical", "sampled"])
def test_several_passes_equal_one(monkeypatch, tmp_path, shuffle, fisher_type):
    results = []
    for fraction in (100.0, 0.7):
        model = build("ViT")
        squeeze(monkeypatch, fraction, block_size="row")
        config = CAPConfig(num_grads=30, fisher_type=fisher_type)
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
        monkeypatch.setattr("cap_hf.compressor.measure", lambda *_, bytes_=bytes_: Costs(16, bytes_))
        compressor = CAPCompressor(model, CAPConfig(num_grads=30)).collect(loader(model, batch_size=16))
        sums.append({name: each.full() for name, each in compressor.fisher.sums.items()})
        assert (compressor.plan.limit < 16) == (bytes_ > 0)
    for name, value in sums[0].items():
        torch.testing.assert_close(value, sums[1][name], rtol=1e-4, atol=1e-7)


def test_batches_that_come_once_serve_one_pass_only(monkeypatch):
    model = build("ViT")
    batches = random_batches(model, 8, sizes=(8, 8))
    compressor = CAPCompressor(model, CAPConfig(num_grads=16)).collect(iter(batches))
    assert compressor.fisher.count == 16
    squeeze(monkeypatch, 1.2, block_size="row")
    with pytest.raises(CAPError, match="passes need the examples again"):
        CAPCompressor(model, CAPConfig(num_grads=16)).collect(iter(batches))


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
    for fraction in (4.0, 1.3):
        for passes in (1, 8):
            squeeze(monkeypatch, fraction, block_size="row")
            config, resources = CAPConfig(num_grads=16, fisher_block_size="auto"), Resources(max_passes=passes)
            compressor = CAPCompressor(model, config, resources=resources).collect(batches)
            found[fraction, passes] = max(target.block_size for target in compressor.targets)
            assert len(compressor.plan.passes) <= passes
            compressor.prune(0.5)
    assert found[4.0, 1] == found[1.3, 8] == 32
    assert found[1.3, 1] < 32


def test_a_full_disk_is_said_before_the_start(monkeypatch):
    model = build("ViT")
    squeeze(monkeypatch, 1.2, block_size="row")
    usage = plan_module.shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda *_: usage)
    with pytest.raises(CAPError, match=r"passes keep .* in .*, where 0.0 MB are free: name another .*--spill_dir"):
        CAPCompressor(model, CAPConfig(num_grads=16)).collect(random_batches(model, 8, sizes=(8, 8)))


def test_the_bytes_of_a_sample_are_those_of_what_autograd_keeps():
    """Twice the layers keep nearly twice the bytes, twice the tokens too."""
    sizes = {}
    for name, changes in {"base": {}, "deep": {"num_hidden_layers": 4}, "long": {"image_size": 16}}.items():
        model = build("ViT", **changes)
        side = changes.get("image_size", 8)
        examples = CalibrationExamples(random_batches(model, side), CAPConfig(), Processes())
        sizes[name] = measure(model, examples.peek(), find_targets(model)).bytes
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert 1.6 < sizes["deep"] / sizes["base"] < 2.1
    assert 2.0 < sizes["long"] / sizes["base"] < 4.5


def test_the_plan_is_said(monkeypatch, capsys):
    model = build("ViT")
    squeeze(monkeypatch, 1.2, block_size="row")
    for disable in (False, True):
        compressor = CAPCompressor(model, CAPConfig(num_grads=16), disable_tqdm=disable)
        compressor.collect(random_batches(model, 8, sizes=(8, 8)))
        assert ("passes over the examples" in capsys.readouterr().err) != disable
