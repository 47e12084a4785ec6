"""The kernel that makes damped Fishers from sums: it makes what the PyTorch code makes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cap_hf.kernels.build import load_extension
from cap_hf.method import fisher as module
from cap_hf.method.fisher import BlockFisher
from cap_hf.method.inputs import moment_size, num_moments
from cap_hf.method.prior import InputPrior
from cap_hf.method.sums import SymmetricSums
from cap_hf.targets import Target

# A layer of 6 rows of 64 weights, one of 4 rows in two groups, and one whose rows no power of two divides.
LAYERS = {
    "linear": (lambda: nn.Linear(64, 6), (1, 16, 32, 64, 128)),
    "grouped": (lambda: nn.Conv2d(8, 4, 4, groups=2), (1, 16, 32, 64, 128)),
    "odd": (lambda: nn.Linear(147, 4), (21, 49, 147, 294)),
}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    assert load_extension("elimination"), "no C++ compiler: the kernels cannot be tested"


def summed(count, size, dtype, generator):
    sums = SymmetricSums.zeros(count, size, dtype, torch.device("cpu"))
    sums.add(slice(None), torch.randn(count, 5, size, generator=generator, dtype=dtype))
    return sums


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layer=st.sampled_from(sorted(LAYERS)),
    place=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    strength=st.sampled_from([None, 0.0, 0.5]),
    skipped=st.integers(0, 1),
)
def test_the_kernel_makes_what_pytorch_makes(seed, layer, place, dtype, strength, skipped):
    generator = torch.Generator().manual_seed(seed)
    make, sizes = LAYERS[layer]
    target = Target("layer", make(), sizes[place % len(sizes)])
    # The first block may be another process's.
    owned = slice(min(skipped, target.num_blocks - 1), target.num_blocks)
    count = owned.stop - owned.start
    prior = None
    if strength is not None:
        moments = summed(num_moments(target), moment_size(target), torch.float64, generator)
        for strip in moments.strips:  # inputs that are all 0
            strip[-1].zero_()
        prior = InputPrior({"layer": moments}, strength)
    sums = {"layer": summed(count, target.block_size, dtype, generator)}
    fisher = BlockFisher(sums, 7, {"layer": 1e-3}, {"layer": owned}, prior=prior)
    some = torch.randperm(count, generator=generator)[: max(1, count // 2)]
    for blocks in (slice(None), slice(0, 1), some):
        found = fisher.damped(target, blocks)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "has_kernels", lambda *_: False)
            expected = fisher.damped(target, blocks)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_moments_are_made_whole_once_for_blocks_that_have_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    target = Target("layer", LAYERS["linear"][0](), 32)
    other = Target("other", LAYERS["linear"][0](), 32)
    moments = {name: summed(2, 32, torch.float64, generator) for name in ("layer", "other")}
    made, full = [], SymmetricSums.full
    monkeypatch.setattr(SymmetricSums, "full", lambda *args: (made.append(args[0]), full(*args))[1])
    prior = InputPrior(moments, 0.5)
    for each, blocks in ((target, [0, 1]), (target, [2, 5]), (other, [0, 1]), (other, [0])):
        whole, places = prior.of(each, torch.tensor(blocks))
        assert torch.equal(whole[places[0, 0]], full(moments[each.name])[0])
    assert made == [moments["layer"], moments["other"], moments["other"]]
    prior.release()
    assert prior.of(other, torch.tensor([0]))[0].shape == (1, 32, 32)
    assert len(made) == 4


def test_blocks_without_sums_are_refused():
    strips = [torch.zeros(2, 4, 4)]
    nothing = (torch.empty(0, 1, 1, dtype=torch.float64), torch.empty(0, dtype=torch.float64))
    for blocks in ([2], [-1]):
        index = torch.tensor(blocks)
        with pytest.raises(RuntimeError, match="blocks that there are no sums of"):
            torch.ops.cap_hf.assemble(strips, index, 1.0, 0.0, *nothing, index.new_empty(1, 0), 0.0)


def test_moments_that_do_not_fit_are_refused():
    strips, index = [torch.zeros(2, 4, 4)], torch.tensor([0])
    moments = torch.zeros(2, 2, 2, dtype=torch.float64)
    for of, traces, places in (
        (moments, torch.zeros(2, dtype=torch.float64), [[0]]),
        (moments, torch.zeros(2, dtype=torch.float64), [[0, 2]]),
        (moments, torch.zeros(1, dtype=torch.float64), [[0, 1]]),
        (moments[:, :1], torch.zeros(2, dtype=torch.float64), [[0, 1]]),
        (moments.float(), torch.zeros(2, dtype=torch.float64), [[0, 1]]),
    ):
        with pytest.raises(RuntimeError, match="moments do not fit the blocks"):
            torch.ops.cap_hf.assemble(strips, index, 1.0, 0.5, of, traces, torch.tensor(places), 0.0)
