"""The prior against loops over examples, positions and rows, alone and as a collection makes it."""

import pytest
import torch
from torch import nn

import cap_hf.collection.plan as plan_module
from cap_hf import CAPCompressor, CAPConfig
from cap_hf.method.inputs import moment_size, num_moments
from cap_hf.method.prior import InputPrior
from cap_hf.method.sums import SymmetricSums
from cap_hf.targets import Target


class Small(nn.Module):
    """Convolutions of every kind, and a Linear that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.uneven = nn.Conv2d(6, 4, (3, 2), padding=(0, 1), dilation=(1, 2))
        self.twice = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 3)
        self.double()
        self.dtype = torch.float64

    def forward(self, pixel_values):
        x = self.uneven(self.grouped(pixel_values).tanh()).tanh().flatten(2).mT
        return (self.classifier(self.twice(self.twice(x).tanh()).mean(dim=1)),)


def rows_seen(module: nn.Module, inputs: torch.Tensor) -> list[list[torch.Tensor]]:
    """For each group of outputs what their weights are multiplied with at every position of one example's input."""
    if isinstance(module, nn.Linear):
        return [list(inputs.reshape(-1, inputs.shape[-1]))]
    channels, height, width = inputs.shape
    (kh, kw), (sy, sx), (py, px), (dy, dx) = module.kernel_size, module.stride, module.padding, module.dilation
    padded = inputs.new_zeros(channels, height + 2 * py, width + 2 * px)
    padded[:, py : py + height, px : px + width] = inputs
    each = channels // module.groups
    return [
        [
            torch.stack(
                [
                    padded[channel, y + i * dy, x + j * dx]
                    for i in range(kh)
                    for j in range(kw)
                    for channel in range(group * each, (group + 1) * each)
                ]
            )
            for y in range(0, height + 2 * py - dy * (kh - 1), sy)
            for x in range(0, width + 2 * px - dx * (kw - 1), sx)
        ]
        for group in range(module.groups)
    ]


def plain_fisher(model: Small, target: Target, examples, strength: float, damp: float) -> torch.Tensor:
    """(1 - s) F + s G' + damp, entry by entry; the parts of a block that lie in one row have a trace of their own."""
    fisher, seen = 0.0, []
    handle = target.module.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()[0]))
    for image, label in examples:
        loss = nn.functional.cross_entropy(model(image[None])[0], label[None])
        block = target.to_blocks(torch.autograd.grad(loss, target.weight)[0])
        fisher = fisher + block[:, :, None] * block[:, None, :] / len(examples)
    handle.remove()
    mean = float(fisher.diagonal(dim1=1, dim2=2).mean())
    groups: list[list[torch.Tensor]] = [[] for _ in range(getattr(target.module, "groups", 1))]
    for inputs in seen:
        for group, rows in zip(groups, rows_seen(target.module, inputs), strict=True):
            group += rows
    moments = [sum(torch.outer(row, row) for row in group) for group in groups]
    mixed = (1 - strength) * fisher
    size, rows = target.row_size, len(target.weight)
    for block in range(target.num_blocks):
        first = block * target.block_size
        for row in range(rows):
            inside = [at for at in range(row * size, (row + 1) * size) if first <= at < first + target.block_size]
            if not inside:
                continue
            moment = moments[row // (rows // len(groups))]
            whole = sum(float(moment[at % size, at % size]) for at in inside)
            trace = sum(float(fisher[block, at - first, at - first]) for at in inside)
            for a in inside:
                for b in inside:
                    mixed[block, a - first, b - first] += strength * trace / whole * moment[a % size, b % size]
    return mixed + damp * mean * torch.eye(target.block_size, dtype=torch.float64)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Allow for a loss that is in float32 whatever the model is in, and nothing more."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("block_size", [6, "row", 36])
def test_what_is_collected_equals_loops(monkeypatch, block_size):
    """Blocks within, of and across rows (36: two rows of the grouped convolution, once of two groups)."""
    monkeypatch.setattr(plan_module, "CACHED_BYTES", 2500)  # batches go through the model in parts
    model, generator = Small(), torch.Generator().manual_seed(1)
    images = torch.randn(5, 4, 6, 7, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1])
    batches = [{"pixel_values": images[part], "labels": labels[part]} for part in (slice(0, 3), slice(3, 5))]
    config = CAPConfig(num_grads=5, fisher_block_size=block_size, prior_strength=0.3, damp=1e-3)
    compressor = CAPCompressor(model, config).collect(batches)
    assert compressor.plan.microbatch < 3
    examples = list(zip(images, labels, strict=True))
    sizes = {target.name: target.block_size for target in compressor.targets}
    assert (
        sizes
        == {
            6: {"grouped": 6, "uneven": 6, "twice": 4},
            "row": {"grouped": 18, "uneven": 36, "twice": 4},
            36: {"grouped": 36, "uneven": 36, "twice": 16},
        }[block_size]
    )
    for target in compressor.targets:
        found = compressor.fisher.damped(target, slice(None))
        assert_near(found, plain_fisher(model, target, examples, 0.3, 1e-3))
        some = torch.tensor([len(found) - 1, 0])
        torch.testing.assert_close(compressor.fisher.damped(target, some), found[some])
    # Without it F is what it was.
    for changes in ({"fisher_prior": "identity"}, {"prior_strength": 0.0}):
        fields = config.to_dict() | changes
        plain = CAPCompressor(model, CAPConfig(**fields)).collect(batches).fisher
        assert plain.prior is None
        for target in compressor.targets:
            assert_near(plain.damped(target, slice(None)), plain_fisher(model, target, examples, 0.0, 1e-3))


def test_what_has_no_gradient_or_no_input_gets_no_prior():
    target = Target("layer", nn.Linear(8, 3, bias=False), 4)
    moments = SymmetricSums.zeros(num_moments(target), moment_size(target), torch.float32, torch.device("cpu"))
    moments.add(slice(0, 1), torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)))
    fisher = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    fisher[1] = fisher[2] = 0  # one has no inputs, the other has some and no gradient
    found = InputPrior({"layer": moments}, 0.5).mix(fisher.clone(), target, torch.tensor([0, 1, 2, 4]))
    assert not found[1:3].any()
    assert found[0].equal(found[3])
    assert float(found[0].trace()) == pytest.approx(4)
    assert not found[0].equal(fisher[0])
