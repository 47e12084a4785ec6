"""What work takes, by trying it and on paper."""

import pytest
import torch
from support.models import build, random_batches

from cap_hf.collection.clock import LAUNCH, LAUNCHES, REACHED, READ, STEP, Clock, PaperClock, forward_operations
from cap_hf.collection.costs import Costs
from cap_hf.collection.hardware import GPUS, Hardware
from cap_hf.collection.resources import Resources
from cap_hf.config import CAPConfig
from cap_hf.method.panels import PANEL

GPU = Hardware("unit", memory=11e9, float32=1e12, float64=5e11, bfloat16=4e12, bandwidth=1e12)


def test_the_operations_of_a_vit_are_those_of_its_products():
    """Counted by hand: patches, projections, scores and their sums, both halves of the MLP, and the head."""
    model = build("ViT")
    config = model.config
    patches = (config.image_size // config.patch_size) ** 2
    tokens, width, inner = patches + 1, config.hidden_size, config.intermediate_size
    layer = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
    embedding = patches * width * config.num_channels * config.patch_size**2
    expected = 2 * (embedding + config.num_hidden_layers * layer + width * config.num_labels)
    assert forward_operations(model, random_batches(model, 8)[0]) == expected


def test_a_clock_measures_here():
    model = build("ViT")
    batch, clock = random_batches(model, 8)[0], Clock(torch.device("cpu"))
    assert clock.forward(model, batch) > 0
    assert all(seconds > 0 for seconds in clock.trials(CAPConfig())[16][:2])
    costs = Costs(seconds=1.5)
    assert clock.timed(costs, 1.0, CAPConfig()) is costs
    assert clock.available(Resources(), costs) is None


def test_on_paper_an_example_takes_its_operations():
    model = build("ViT")
    batch, clock = random_batches(model, 8)[0], PaperClock(GPU)
    seconds = clock.forward(model, batch)
    assert seconds == forward_operations(model, batch) / (REACHED * 1e12)
    assert clock.forward(model, batch, torch.bfloat16) == seconds / 4


def test_on_paper_a_gradient_sample_is_three_forward_passes_of_its_examples():
    clock, costs = PaperClock(GPU), Costs(samples=2, bytes=123, seconds=9.0, order=["a"])
    found = clock.timed(costs, 2.0, CAPConfig(samples_per_grad=4))
    assert found.seconds == 3 * 2.0 * 4
    assert (found.bytes, found.order) == (123, ["a"])
    # Sums of 4 bytes are read and written once for both samples; of many samples the products take longer.
    assert found.multiplications == pytest.approx(0.15e12)
    assert clock.timed(Costs(samples=64), 2.0, CAPConfig()).multiplications == 0.5 * REACHED * 1e12
    # Nothing goes backward where inputs alone are summed.
    assert clock.timed(costs, 2.0, CAPConfig(method="wanda")).seconds == 2.0


def test_on_paper_blocks_take_their_operations_and_small_ones_their_launches():
    clock = PaperClock(GPU)
    trials = clock.trials(CAPConfig())
    eliminated, solved, more = trials[3072]
    assert 8 / 3 * 3072**3 / (REACHED * 1e12) < eliminated < 2 * 8 / 3 * 3072**3 / (REACHED * 1e12)
    assert solved == 2 / 3 * 3072**3 / (REACHED * 5e11)
    # One more sparsity reads half of the factor, and F, in float64.
    assert more == pytest.approx((4 + 8) * 3072**2 / (READ * GPU.bandwidth))
    # 128 blocks of 1,448 fill a batch of 2 GiB, 32 of 2,896: as many share the launches of a panel. Steps come one
    # after the other, of as many blocks at once as there are multiprocessors.
    launched = [LAUNCH * LAUNCHES * panels / blocks for panels, blocks in ((23, 128), (46, 32))]
    launched[0] += 2 * STEP * 1448 / 128
    launched[1] += STEP * 2896 / 32
    # Within a panel each step reads what the others before it have left.
    read = [4 * PANEL * size**2 / 4 / (READ * GPU.bandwidth) for size in (1448, 2896)]
    small, large = (trials[size][0] - each - own for size, each, own in zip((1448, 2896), launched, read, strict=True))
    assert small == pytest.approx(large / 8)


def test_on_paper_a_gpu_is_free_but_for_the_model():
    clock, costs = PaperClock(GPU), Costs(model=2 * 10**9)
    assert clock.available(Resources(), costs) == int(0.85 * 8e9)
    assert clock.available(Resources(max_memory="5GB"), costs) == 3 * 10**9
    assert PaperClock(GPUS["H100"]).available(Resources(), costs) > 60e9
