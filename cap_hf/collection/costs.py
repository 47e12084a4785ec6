"""What a gradient sample costs in memory and time, measured on the first examples."""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from cap_hf.collection import input_sums
from cap_hf.collection.chains import find_chains
from cap_hf.collection.exchange import made_in
from cap_hf.collection.running import Batch, backward, frozen
from cap_hf.collection.shares import row_chunks
from cap_hf.collection.stretches import Chain
from cap_hf.method.gradients import GradientSamples, StepGradients
from cap_hf.method.losses import FisherLoss
from cap_hf.method.sums import SymmetricSums, sums_per_block
from cap_hf.targets import Layer, Target
from cap_hf.towers import see

# Gradient samples that are measured.
MEASURED = 2
# Examples that are measured without gradients.
EXAMPLES = 16
# What lives during a pass beside the tensors that are saved for the backward pass.
PASSING = 1.25


@dataclass
class Costs:
    """What the plan and the bar start from.

    Attributes:
        samples: gradient samples of the first batch.
        bytes: that one gradient sample takes while it is in the model.
        kept: bytes that stay of it until the step ends: the inputs of the targets, and the gradients of their outputs.
        widest: bytes of the largest of these.
        patches: bytes of its patches in the convolution that has most of them.
        held: bytes that a convolution holds of it, patches or gradients, at most.
        model: bytes of the model's parameters and buffers.
        seconds: of its forward and backward pass.
        multiplications: how many take a second while outer products are summed.
        order: names of the targets in the order in which the backward pass meets them.
        positions: for each target's name how many positions (tokens, pixels) of a gradient sample go through it.
        kept_of: for each target's name the bytes of what is kept of it; what several are called with is that of each.
        work: for each Linear and Conv2d of the model, in its order, the multiply-adds of a gradient sample in it; those
            that share a weight have theirs each.
        chains: layers that can be gone through alone.
    """

    samples: int = 0
    bytes: int = 0
    kept: int = 0
    widest: int = 0
    patches: int = 0
    held: int = 0
    model: int = 0
    seconds: float = 0.0
    multiplications: float = 1e10
    order: list[str] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    kept_of: dict[str, int] = field(default_factory=dict)
    work: dict[nn.Module, int] = field(default_factory=dict)
    chains: list[Chain] = field(default_factory=list)

    def summing_seconds(self, targets: Sequence[Target], inputs: bool = False, gradients: bool = True) -> float:
        """Return the seconds that the outer products of one gradient sample take, and those of its inputs."""
        count = gradients * sum(products(target) for target in targets)
        count += inputs * sum(input_sums.products(target, self.positions.get(target.name, 0)) for target in targets)
        return count / self.multiplications


def products(target: Target) -> float:
    """Return the multiplications of one gradient sample's outer products in all blocks of a target, or of its part."""
    return target.num_blocks * float(sums_per_block(target.block_size)) / target.part[1]


def measure(
    model: nn.Module,
    examples: Iterable[tuple[Batch, int, torch.Tensor | None]],
    targets: Sequence[Target],
    loss: FisherLoss | None,
) -> Costs:
    """Take the first gradient samples through the model, forward and backward; forward alone where there is no loss.

    Args:
        model: within `frozen` or not.
        examples: as `CalibrationExamples` yields them; none cost nothing.
        targets: whose gradients are made.
        loss: whose gradients they are; None where nothing but inputs is summed, which keeps nothing in memory and
            needs neither labels nor a head.

    Raises:
        CAPError: a layer mixes examples, a label is none of the classes, or the model does not return what the loss is
            made from.
    """
    batch, samples, draws = next(iter(examples), (None, 0, None))
    if batch is None:
        return Costs()
    count = min(MEASURED, samples)
    first = len(batch["pixel_values"]) // samples * count
    # Copies: a view's memory would count as that of the whole batch.
    batch = {name: value[:first].clone() for name, value in batch.items()}
    draws = None if draws is None else draws[:first]
    with frozen(model):
        if loss is None:
            costs = Costs(positions=count_positions(model, batch, targets, count))
        else:
            costs = measure_memory(model, batch, loss, draws, targets, count)
            costs.chains = find_chains(model, batch, loss, draws, targets, count)
        # Once more: the first time a device sets itself up.
        costs.seconds = timed_step(model, batch, loss, draws, targets, count) / count
    costs.samples, costs.work = samples, count_work(model, batch, count)
    costs.model = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    costs.multiplications = summing_speed(max(targets, key=products))
    return costs


def count_positions(model: nn.Module, batch: Batch, targets: Sequence[Target], samples: int) -> dict[str, int]:
    """Return how many positions of a gradient sample go through each target, of a batch of so many of them."""
    found: dict[str, int] = {}

    def note(target: Target, output: torch.Tensor) -> None:
        found[target.name] = found.get(target.name, 0) + output.numel() // len(target.weight) // samples

    with ExitStack() as stack:
        for target in targets:
            for module in target.modules:
                handle = module.register_forward_hook(lambda module, args, output, each=target: note(each, output))
                stack.callback(handle.remove)
        forward(model, batch)
    return found


def count_work(model: nn.Module, batch: Batch, samples: int) -> dict[nn.Module, int]:
    """Return what `Costs.work` is, of a batch of so many gradient samples."""
    work: dict[nn.Module, int] = {module: 0 for module in model.modules() if isinstance(module, Layer)}

    def note(module: Layer, args: tuple[Any, ...], output: Any) -> None:
        # Of what gives no tensor nothing is known, and nothing is pruned.
        if isinstance(output, torch.Tensor):
            work[module] += output.numel() // len(module.weight) * module.weight.numel() // samples

    with ExitStack() as stack, frozen(model):
        for module in work:
            stack.callback(module.register_forward_hook(note).remove)
        forward(model, batch)
    return work


def measure_memory(
    model: nn.Module,
    batch: Batch,
    loss: FisherLoss,
    draws: torch.Tensor | None,
    targets: Sequence[Target],
    count: int,
) -> Costs:
    """Return what `count` gradient samples take in memory, each, and the order in which targets come."""
    costs = Costs()
    held: dict[int, int] = {}
    kept: dict[int, int] = {}
    outputs: list[int] = []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def keep(target: Target, given: torch.Tensor, output: torch.Tensor) -> None:
        storage = hold(given).untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        outputs.append(output.nbytes)
        costs.kept_of[target.name] = costs.kept_of.get(target.name, 0) + (storage.nbytes() + output.nbytes) // count

    def note(target: Target, gradients: StepGradients) -> None:
        costs.order.append(target.name)
        costs.patches = max(costs.patches, gradients.patch_bytes)
        costs.held = max(costs.held, gradients.held_bytes)
        costs.positions[target.name] = gradients.positions

    with ExitStack() as stack:
        for target in targets:
            for module in target.modules:
                hook = module.register_forward_hook(lambda _, args, output, each=target: keep(each, args[0], output))
                stack.callback(hook.remove)
        hooks = stack.enter_context(GradientSamples(targets, note))
        stack.enter_context(saved_tensors_hooks(hold, lambda saved: saved))
        hooks.start(count)
        backward(model, batch, loss, draws)
    costs.bytes = int(PASSING * sum(held.values()) / count)
    costs.kept = (sum(kept.values()) + sum(outputs)) // count
    costs.widest = max((*kept.values(), *outputs), default=0) // count
    return costs


def timed_step(
    model: nn.Module,
    batch: Batch,
    loss: FisherLoss | None,
    draws: torch.Tensor | None,
    targets: Sequence[Target],
    count: int,
) -> float:
    """Return the seconds of a forward and backward pass with hooks, or of a forward pass where there is no loss."""
    synchronize(targets[0].weight.device)
    start = time.perf_counter()
    if loss is None:
        forward(model, batch)
    else:
        with GradientSamples(targets, lambda target, gradients: None) as hooks:
            hooks.start(count)
            backward(model, batch, loss, draws)
    synchronize(targets[0].weight.device)
    return time.perf_counter() - start


def forward_seconds(model: nn.Module, batch: Batch, dtype: torch.dtype | None = None) -> float:
    """Return the seconds that one example takes through a model, without gradients, of a few that go together.

    Args:
        model: on the device of the batch.
        batch: its labels are left out.
        dtype: of mixed precision; None for none.
    """
    few = {name: value[:EXAMPLES] for name, value in batch.items() if name != "labels"}
    device, seconds = few["pixel_values"].device, []
    with frozen(model), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for _ in range(3):  # the first time a device sets itself up
            synchronize(device)
            start = time.perf_counter()
            forward(model, few)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    return min(seconds) / len(few["pixel_values"])


def forward(model: nn.Module, batch: Batch) -> None:
    """Take a batch through the model, forward, and keep nothing of it."""
    with torch.no_grad():
        see(model, batch)


def summing_speed(target: Target, samples: int = 16) -> float:
    """Return how many multiplications take a second while one chunk of a target is summed."""
    chunk = row_chunks(target, target.weight.device)[0]
    blocks = (chunk.stop - chunk.start) * target.row_size // target.block_size
    device = target.weight.device
    sums = SymmetricSums.zeros(blocks, target.block_size, made_in(target), device)
    factors = torch.ones(blocks, samples, target.block_size, dtype=sums.dtype, device=device)
    seconds = []
    for _ in range(2):  # the first touches fresh memory
        synchronize(device)
        start = time.perf_counter()
        sums.add(slice(None), factors)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return samples * blocks * sums_per_block(target.block_size) / max(seconds[-1], 1e-9)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
