"""Gradients on their way to the process that owns their blocks; several processes are tested in distributed/."""

import pytest
import torch
from torch import nn

from cap_hf.collection.exchange import Exchange, peak_bytes
from cap_hf.distributed.processes import Processes
from cap_hf.method.gradients import LayerGradients, StepGradients
from cap_hf.targets import Target


def gradients(target: Target, samples: int = 6) -> tuple[StepGradients, torch.Tensor]:
    """Random gradients, as factors and as `(samples, num_blocks, B)`."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 3, target.row_size, generator=generator)
    grads = torch.randn(samples, 3, len(target.weight), generator=generator)
    whole = torch.einsum("spi,spo->soi", inputs, grads)
    return StepGradients([[LayerGradients(target, target.module, inputs, grads, samples)]]), target.to_blocks(whole)


@pytest.mark.parametrize("size", [4, 12, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_arrives_once_in_order(size, dtype):
    target = Target("layer", nn.Linear(12, 80, bias=False), size)
    made, expected = gradients(target)
    exchange, arrived = Exchange(Processes(), dtype), []
    for blocks, (part,) in exchange.arrivals(target, made, [6]):
        assert part.dtype == dtype
        assert blocks.start == sum(len(each) for each in arrived)
        arrived.append(part.clone())
    assert len(arrived) > 1
    found = torch.cat(arrived).transpose(0, 1).float()
    torch.testing.assert_close(
        found, expected.to(dtype).float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_takes_no_more_memory_than_it_says(dtype):
    target = Target("layer", nn.Linear(12, 80, bias=False), 12)
    exchange = Exchange(Processes(), dtype)
    for _ in exchange.arrivals(target, gradients(target)[0], [6]):
        pass
    taken = sum(buffer.nbytes for buffer in exchange._buffers.values())
    assert 0 < taken <= peak_bytes(target, Processes(), 6, dtype)


def test_samples_that_are_announced_and_not_given_are_an_error():
    target = Target("layer", nn.Linear(12, 80, bias=False), 12)
    with pytest.raises(ValueError, match="6 gradient samples of layer are announced and not given"):
        next(Exchange(Processes(), torch.float32).arrivals(target, None, [6]))
