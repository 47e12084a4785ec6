"""The pretend accelerator itself: it computes what the CPU does and refuses what CUDA refuses."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import pretend
from support.models import build, random_batches
from torch.nn import functional as F

# Not a torch.device: the process that collects the tests has none.
DEVICE = "pretend"


def made(*shape, dtype=torch.float64):
    """Random numbers, on the CPU and on the device."""
    host = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)
    return host, host.to(DEVICE)


def positive_definite(x):
    return x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def into(function, *shape):
    """A function that writes into `out`."""

    def run(x):
        out = x.new_empty(shape)
        function(x, out)
        return out

    return run


def assigned(x):
    x = x.clone()
    x[:, torch.tensor([1, 2])] = torch.tensor(5.0, dtype=x.dtype)
    return x


OPERATORS = {
    "in place": lambda x: x.clone().mul_(2).add_(x).clamp_(min=0),
    "view in place": lambda x: x.clone().view(-1)[2:6].view(2, 2).t().fill_(7),
    "view of a view": lambda x: x.clone()[:, 1:3].transpose(0, 1).flatten(),
    "product": lambda x: x @ x.mT,
    "linear": lambda x: F.linear(x, x[0], x[0, :, 0]),
    "baddbmm_": lambda x: x.clone()[:, 1:3].baddbmm_(x[:, 1:3], x),
    "baddbmm out": into(lambda x, out: torch.baddbmm(x, x, x, out=out), 3, 4, 4),
    "out of another size": into(lambda x, out: torch.bmm(x, x, out=out), 0),
    "inverse": lambda x: torch.linalg.inv(positive_definite(x)),
    "cholesky": lambda x: torch.cholesky_inverse(torch.linalg.cholesky_ex(positive_definite(x))[0]),
    "solve": lambda x: torch.linalg.solve(positive_definite(x), x),
    "triangular": lambda x: torch.linalg.solve_triangular(positive_definite(x), x, upper=True),
    "eigenvalues": lambda x: torch.linalg.eigvalsh(positive_definite(x)),
    "index": lambda x: x[torch.tensor([2, 0])],
    "boolean index": lambda x: x[x > 0],
    "index_put": lambda x: x.clone().index_put_((torch.tensor([1], device=x.device),), x[:1]),
    "index_add": lambda x: x.clone().index_add_(0, torch.tensor([0, 0, 2], device=x.device), x),
    "assignment": assigned,
    "scatter": lambda x: torch.zeros_like(x).scatter_(1, x.argsort(dim=1), x),
    "gather": lambda x: x.gather(1, x.argsort(dim=1)),
    "searchsorted": lambda x: torch.searchsorted(x.sort(dim=2)[0], x.transpose(1, 2).contiguous()),
    "topk": lambda x: x.topk(2)[0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "unique": lambda x: (x * 2).long().unique(),
    "bincount": lambda x: torch.bincount(x.abs().long().flatten(), minlength=5),
    "cummax": lambda x: x.cummax(dim=1)[0],
    "where": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    "masked_fill": lambda x: x.masked_fill(x > 0, torch.tensor(0.0)),
    "factories": lambda x: torch.arange(4, device=x.device) + torch.eye(4, device=x.device),
    "bytes": lambda x: x.view(torch.uint8),
    "unfold": lambda x: F.unfold(x[:, None], 2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "convolution": lambda x: F.conv2d(x[:, None], x[:, None, :2, :2], padding=1),
    "interpolation": lambda x: F.interpolate(x[:, None], scale_factor=2.0, mode="bicubic"),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "cross entropy": lambda x: F.cross_entropy(x[0], torch.tensor([0, 1, 2, 3], device=x.device)),
    "bfloat16": lambda x: (x.to(torch.bfloat16) @ x.to(torch.bfloat16)).float(),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_give_what_the_cpu_gives(name):
    host, device = made(3, 4, 4)
    expected, found = OPERATORS[name](host), OPERATORS[name](device)
    assert found.device.type == "pretend"
    assert found.shape == expected.shape
    torch.testing.assert_close(found.cpu(), expected)


REFUSED = {
    "sum": lambda host, device: device + host,
    "sum in place": lambda host, device: host.add_(device),
    "product": lambda host, device: device @ host,
    "linear": lambda host, device: F.linear(device, host),
    "bmm out": lambda host, device: torch.bmm(device[None], device[None], out=host.clone()[None]),
    "concatenation": lambda host, device: torch.cat([device, host]),
    "where": lambda host, device: torch.where(device > 0, device, host),
    "gather": lambda host, device: device.gather(0, host.long().clamp_(0, 3)),
    "index_select": lambda host, device: device.index_select(0, torch.tensor(0)),
    "index_add": lambda host, device: device.index_add_(0, torch.arange(4), device),
    "scatter": lambda host, device: device.scatter_(0, torch.zeros(1, 4, dtype=torch.long), device.clone()),
    "searchsorted": lambda host, device: torch.searchsorted(device, host),
    "convolution": lambda host, device: F.conv2d(device[None, None], host[None, None]),
    "index on the device of a CPU tensor": lambda host, device: host[torch.tensor([0], device=DEVICE)],
    "another device": lambda host, device: device + device.to("pretend:1"),
    "numpy": lambda host, device: device.numpy(),
    "generator": lambda host, device: torch.randn(3, device=DEVICE, generator=torch.Generator()),
    "product of integers": lambda host, device: device.long() @ device.long(),
    "decomposition in bfloat16": lambda host, device: torch.linalg.cholesky(device.bfloat16()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(name):
    host, device = made(4, 4)
    with pytest.raises((RuntimeError, TypeError, NotImplementedError), match="device|numpy|not implemented|indices"):
        REFUSED[name](host, device)


def test_operators_of_the_cpu_alone_are_not_there():
    from cap_hf.kernels.build import load_extension

    assert load_extension("elimination")
    schema = next(op for op in torch._C._jit_get_all_schemas() if op.name.startswith("cap_hf::"))
    operator = getattr(torch.ops.cap_hf, schema.name.split("::")[1])
    arguments = [
        torch.ones(1, 2, 2, dtype=torch.float64, device=DEVICE) if str(argument.type) == "Tensor" else 1
        for argument in schema.arguments
    ]
    with pytest.raises((NotImplementedError, RuntimeError), match="Could not run"):
        operator(*arguments)


@pytest.mark.parametrize("name", ["ViT", "Swin", "ConvNext", "ResNet"])
def test_models_and_their_gradients(name):
    side = {"ViT": 8, "Swin": 16, "ConvNext": 32, "ResNet": 16}[name]
    host = build(name).train()
    (batch,) = random_batches(host, side, sizes=(4,))
    device = copy.deepcopy(host)
    parameter = next(device.parameters())
    device.to(DEVICE)
    assert next(device.parameters()) is parameter
    # Swin drops paths: at random, but from the same seed.
    torch.manual_seed(0)
    host(**batch).loss.backward()
    device(**{key: value.to(DEVICE) for key, value in batch.items()}).loss.backward()
    for (key, expected), found in zip(host.named_parameters(), device.parameters(), strict=True):
        assert found.device.type == found.grad.device.type == "pretend", key
        torch.testing.assert_close(found.grad.cpu(), expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, lambda p: torch.optim.AdamW(p, fused=True)])
def test_optimizers(make):
    results = []
    for parameter in made(3, 4):
        parameter.requires_grad_()
        optimizer = make([parameter])
        for _ in range(3):
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
        results.append(parameter.detach().cpu())
    torch.testing.assert_close(*results)


def test_fresh_memory_is_not_zero():
    assert torch.empty(3, device=DEVICE).isnan().all()


def test_random_numbers_are_its_own():
    before = torch.get_rng_state()
    torch.manual_seed(0)
    first = torch.randn(4, device=DEVICE)
    state = torch.pretend.get_rng_state()
    host = torch.get_rng_state()
    second, dropped = torch.randn(4, device=DEVICE), F.dropout(torch.ones(64, device=DEVICE))
    assert torch.equal(torch.get_rng_state(), host)
    torch.pretend.set_rng_state(state)
    assert torch.equal(torch.randn(4, device=DEVICE), second)
    assert torch.equal(F.dropout(torch.ones(64, device=DEVICE)), dropped)
    generator = torch.Generator(DEVICE).manual_seed(0)
    assert torch.equal(torch.randn(4, device=DEVICE, generator=generator), first)
    torch.set_rng_state(before)


def test_memory_is_counted_and_limited():
    before = torch.pretend.memory_allocated()
    tensor = torch.zeros(1000, device=DEVICE)
    assert torch.pretend.memory_allocated() - before == torch.accelerator.memory_allocated() - before == 4000
    doubled = tensor * 2
    assert torch.pretend.memory_allocated() - before == 8000
    torch.pretend.reset_peak_memory_stats()
    del doubled, tensor
    assert torch.pretend.memory_allocated() == before
    assert torch.pretend.max_memory_allocated() - before == 8000
    with pretend.capacity(1000):
        assert torch.pretend.mem_get_info()[0] == 1000
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1000, device=DEVICE)
    free, total = torch.accelerator.get_memory_info()
    assert total - free == before


def test_launches_and_waits_are_counted():
    x = torch.ones(4, device=DEVICE)
    with pretend.count_launches() as counts:
        (x.view(2, 2)[0] + 1).sum().item()
        x.cpu()
    assert counts.launches == {"aten::add": 1, "aten::sum": 1}
    assert counts.transfers == {"aten::_local_scalar_dense": 1, "device to host": 1}


def test_saved_and_loaded(tmp_path):
    model = build("ViT").to(DEVICE)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    whole = torch.load(tmp_path / "state.pt")
    there, here = (
        load_file(tmp_path / "state.safetensors", device="pretend:0"),
        load_file(tmp_path / "state.safetensors"),
    )
    for name, tensor in model.state_dict().items():
        assert whole[name].device == there[name].device == tensor.device
        assert torch.equal(whole[name], tensor)
        assert torch.equal(there[name].cpu(), here[name])


def test_pinned_memory():
    assert not torch.ones(3).is_pinned()
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned()
    assert torch.equal(pinned.to(DEVICE, non_blocking=True).cpu(), torch.ones(3))


def test_autocast():
    x = torch.ones(2, 2, device=DEVICE)
    with torch.autocast("pretend", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert F.layer_norm(x, (2,)).dtype == torch.float32


def test_accelerate_and_transformers_take_it_for_a_gpu(tmp_path):
    from accelerate import Accelerator
    from transformers import TrainingArguments

    assert torch.accelerator.current_accelerator().type == DEVICE
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    assert arguments.device.type == Accelerator().device.type == "pretend"
