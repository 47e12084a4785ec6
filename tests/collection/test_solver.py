"""Batches of blocks, and errors that name the block."""

import pytest
import torch
from torch import nn

from cap_hf.collection import solver as solver_module
from cap_hf.collection.solver import Solver, default_batch_bytes, order_dtype, peak_bytes, work_of
from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError
from cap_hf.method import elimination
from cap_hf.method.elimination import eliminate, eliminate_fisher
from cap_hf.method.fisher import BlockFisher
from cap_hf.method.inverses import invert
from cap_hf.method.panels import Elimination, LostPivotError
from cap_hf.method.sums import SymmetricSums
from cap_hf.patterns import NMPattern
from cap_hf.targets import Target


def problem(blocks: int = 10, size: int = 8) -> tuple[Target, BlockFisher, torch.Tensor]:
    """A target whose first two blocks another process owns."""
    target = Target("layer", nn.Linear(size, blocks + 2, bias=False), size)
    sums = SymmetricSums.zeros(blocks, size, torch.float32, torch.device("cpu"))
    sums.add(slice(None), torch.randn(blocks, 20, size, generator=torch.Generator().manual_seed(0)))
    fisher = BlockFisher({"layer": sums}, 20, {"layer": 1e-3}, {"layer": slice(2, blocks + 2)})
    return target, fisher, target.weight.detach()[2:].clone()


@pytest.mark.parametrize("pattern", [None, NMPattern(2, 4)])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_batches_change_nothing(pattern, batch):
    target, fisher, weights = problem()
    advanced = []
    solver = Solver(CAPConfig(), fisher, batch_bytes=8 * 8**2 * batch)
    found = solver.eliminate(target, weights, pattern, lambda count, work: advanced.append((count, work)))
    exact = eliminate(weights.double(), invert(fisher.damped(target, slice(None))), pattern)
    assert torch.equal(found.order.long(), exact.order)
    torch.testing.assert_close(found.losses, exact.losses.float(), rtol=1e-5, atol=0)
    together = eliminate_fisher(weights.double(), fisher.damped(target, slice(None)), pattern)
    assert torch.equal(found.losses, together.losses.float())
    assert sum(count for count, _ in advanced) == 10
    assert sum(work for _, work in advanced) == work_of(target, 10)
    counts = torch.arange(10) % 5
    ((new, loss),) = solver.reconstruct(target, weights, found, [counts], pattern, lambda *_: None)
    assert torch.equal((new == 0).sum(dim=1), counts)
    assert loss >= 0


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_several_times_give_what_each_alone_does_and_make_each_fisher_once(monkeypatch, batch):
    target, fisher, weights = problem()
    solver = Solver(CAPConfig(), fisher, batch_bytes=8 * 8**2 * batch)
    found = solver.eliminate(target, weights, None, lambda *_: None)
    times = [torch.full((10,), count) for count in (2, 4, 7)] + [torch.arange(10) % 8]
    alone = [solver.reconstruct(target, weights, found, [each], None, lambda *_: None)[0] for each in times]
    made, damped, advanced = [], BlockFisher.damped, []
    monkeypatch.setattr(BlockFisher, "damped", lambda *args: (made.append(1), damped(*args))[1])
    together = solver.reconstruct(target, weights, found, times, None, lambda count, work: advanced.append(count))
    for (new, loss), (expected, cost) in zip(together, alone, strict=True):
        assert torch.equal(new, expected)
        assert loss == pytest.approx(cost, rel=1e-12)
    # The new weights of all times take memory beside the Fisher.
    assert len(made) == -(-10 // max(1, batch * 8**2 // (8**2 + len(times) * 8)))
    assert sum(advanced) == 4 * 10
    # Each block by itself, by the equation: F_SS (w'_S - w_S) = F_SP w_P.
    matrices = fisher.damped(target, slice(None))
    for block, count in enumerate(times[-1].tolist()):
        gone = found.order[block, :count].long()
        left = torch.tensor([each for each in range(8) if each not in gone.tolist()])
        old = weights[block].double()
        moved = torch.linalg.solve(matrices[block][left][:, left], matrices[block][left][:, gone] @ old[gone])
        torch.testing.assert_close(together[-1][0][block][left].double(), old[left] + moved, rtol=1e-4, atol=1e-6)


def test_no_blocks_are_no_error():
    target, fisher, weights = problem()
    found = Solver(CAPConfig(), fisher).eliminate(target, weights[:0], None, lambda *_: None)
    assert found.order.shape == found.losses.shape == (0, 8)


def test_an_error_names_the_block_by_its_number_in_the_target(monkeypatch):
    target, fisher, weights = problem()
    solver = Solver(CAPConfig(), fisher, batch_bytes=8 * 8**2 * 4)

    def lose(weights, inverse, pattern):
        raise LostPivotError(torch.arange(len(weights)) >= min(1, len(weights) - 1))

    with monkeypatch.context() as patch:
        patch.setattr(elimination, "eliminate", lose)
        with pytest.raises(CAPError, match=r"pivot of layer \(block 3\): raise the damp, now 0.0005"):
            solver.eliminate(target, weights, None, lambda *_: None)
    fisher.sums["layer"].strips[0][7, 0, 0] = -1e6
    for pruner in (
        lambda: solver.eliminate(target, weights, None, lambda *_: None),
        lambda: Solver(CAPConfig(weight_update="independent"), fisher).reconstruct(
            target,
            weights,
            Elimination(torch.zeros(10, 8, dtype=torch.int16), torch.zeros(10, 8)),
            [torch.tensor([1] * 7 + [0] + [1] * 2)],
            None,
            lambda *_: None,
        ),
    ):
        with pytest.raises(CAPError, match=r"Fisher of layer \(block 9\) cannot be inverted with damp=0.0005: --damp"):
            pruner()


def test_positions_take_as_few_bytes_as_they_can():
    small, large = (Target("layer", nn.Linear(size, 2, bias=False), size) for size in (32767, 32768))
    assert (order_dtype(small), order_dtype(large)) == (torch.int16, torch.int32)


def test_it_says_what_it_takes():
    target, _, _ = problem()
    assert peak_bytes([target], 10**6) == 8 * 10**6
    assert peak_bytes([target], 0) == 8 * 8 * 8**2
    assert default_batch_bytes(torch.device("cpu")) == solver_module.BATCH_BYTES
    assert default_batch_bytes(torch.device("meta")) > 10 * solver_module.BATCH_BYTES
