"""Several processes on CPUs give each other what they should, and the sums and weights of one process."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.launching import launch, launch_machines

from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError


def processes(rank: int, world: int) -> Processes:
    """One of several processes that are not there: enough for what needs no other."""
    return Processes(SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu")))


@pytest.mark.parametrize(("count", "world"), [(16, 1), (16, 3), (5, 4), (3, 4), (0, 2), (48, 16), (7, 2)])
def test_shares_are_even_and_take_turns(count, world):
    everyone = processes(0, world)
    assert everyone.shares(count) == [slice(count * r // world, count * (r + 1) // world) for r in range(world)]
    totals = [0] * world
    for turn in range(world):
        shares = everyone.shares(count, turn)
        assert [index for share in shares for index in range(count)[share]] == list(range(count))
        sizes = [share.stop - share.start for share in shares]
        assert max(sizes) - min(sizes) <= 1
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]
    assert totals == [count] * world
    assert everyone.shares(count, world + 1) == everyone.shares(count, 1)


def test_one_process_alone():
    alone, tensor = Processes(), torch.arange(6).view(2, 3)
    assert alone.gather_ints(3, 4) == [[3, 4]]
    assert alone.before(tensor).equal(torch.zeros_like(tensor))
    assert alone.sum(tensor) is tensor
    assert alone.share_object({"order": ("b", "a")}) == {"order": ["b", "a"]}
    assert alone.assemble(tensor, [slice(0, 2)]) is tensor
    assert alone.exchange(tensor, [6], tensor, [6])()[0] is tensor
    assert alone.on_first(lambda: [1, (2.5,)]) == [1, [2.5]]
    with pytest.raises(CAPError, match="^it is broken$"):
        alone.on_first(fail)


def fail():
    raise CAPError("it is broken")


# Both processes work out what they should be told. No tensor is contiguous.
TELLING = """
import torch
from accelerate import Accelerator
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError

accelerator = Accelerator(cpu=True)
everyone = Processes(accelerator)
rank = everyone.rank
tensors = [torch.arange(20 * (r + 1), dtype=torch.int64).view(4, 5 * (r + 1))[:, :: r + 1] * (r + 1) for r in range(2)]
own = tensors[rank]
assert everyone.gather_ints(rank, 7) == [[0, 7], [1, 7]]
assert everyone.before(own).equal(torch.zeros(4, 5, dtype=torch.int64) if rank == 0 else tensors[0])
assert everyone.on_first(lambda: rank) == 0

def fail():
    raise CAPError(f"broken on {rank}")

try:
    everyone.on_first(fail)
except CAPError as error:
    assert str(error) == "broken on 0"
else:
    raise AssertionError("nothing was raised")
order = {"order": ["layer.1", "é" * rank], "count": rank}
for source in range(2):
    assert everyone.share_object(order, source) == {"order": ["layer.1", "é" * source], "count": source}

summed = torch.zeros(4, 10, dtype=torch.int64)[:, ::2]
assert everyone.sum(summed.copy_(own)) is summed
assert summed.equal(tensors[0] + tensors[1])

for dtype in (torch.float64, torch.bfloat16, torch.bool, torch.int16):
    rows = [slice(0, 1), slice(1, 4)]
    whole = (torch.arange(24).view(6, 4).T % 7).to(dtype)
    assert everyone.assemble(whole[rows[rank]], rows).equal(whole), dtype

# 1 entry for process 0 and 2 for process 1, whoever sends them.
sent = (torch.arange(6) + 10 * rank).bfloat16()[::2]
received = torch.full((8,), -1.0, dtype=torch.bfloat16)[::2][: 2 * (rank + 1)]
parts = everyone.exchange(sent, [1, 2], received, [rank + 1] * 2)()
expected = [[0.0], [10.0]] if rank == 0 else [[2.0, 4.0], [12.0, 14.0]]
assert [part.tolist() for part in parts] == expected, parts
assert received.tolist() == [value for part in expected for value in part]
accelerator.end_training()
"""


def test_what_two_processes_tell_each_other(tmp_path):
    (tmp_path / "telling.py").write_text(TELLING)
    launch(2, script=tmp_path / "telling.py")


SHUFFLED = """
import sys
import torch
from torch.utils.data import DataLoader
from accelerate import Accelerator
from support.models import build, random_batches
from cap_hf import CAPCompressor, CAPConfig

accelerator = Accelerator(cpu=True)
torch.manual_seed(accelerator.process_index)  # processes that would each shuffle in their own way
model = build("ViT")
(batch,) = random_batches(model, 8, sizes=(50,))
examples = [{name: value[i] for name, value in batch.items()} for i in range(50)]
loader = DataLoader(examples, batch_size=16, shuffle=True)
fisher = CAPCompressor(model, CAPConfig(num_grads=50), accelerator).collect(loader).fisher
own = [batch] if accelerator.is_main_process else []
whole = CAPCompressor(model, CAPConfig(num_grads=50), accelerator).collect(own)
assert any(len(sums) for sums in fisher.sums.values())
assert fisher.count == whole.fisher.count == 50
for name, sums in fisher.sums.items():
    torch.testing.assert_close(sums.full(), whole.fisher.sums[name].full(), rtol=1e-3, atol=1e-6)
accelerator.end_training()
"""


EVERYTHING = """
import sys
import torch
from accelerate import Accelerator
from support.models import ARCHITECTURES, build, random_batches
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection import plan
from cap_hf.collection.shares import block_shares
from cap_hf.distributed.processes import Processes

accelerator = Accelerator(cpu=True)
plan.CACHED_BYTES = 12000  # a batch of 4 goes through the models in parts
found, parts = {}, set()
for name, config in {
    "ViT": {}, "ResNet": {}, "ConvNext": {"fisher_block_size": 8}, "Swin": {"allocation": "uniform"},
    "Dinov2": {"allocation": "2:4"}, "DeiT": {"method": "obs", "fisher_dtype": "bfloat16"},
}.items():
    model = build(name)
    (batch,) = random_batches(model, ARCHITECTURES[name][1], sizes=(41,))
    examples = [{key: value[i] for key, value in batch.items()} for i in range(41)]
    loader = DataLoader(examples, batch_size=4, shuffle=True)
    compressor = CAPCompressor(model, CAPConfig(num_grads=38, **config), accelerator, disable_tqdm=True)
    compressor.collect(loader).prune(None if "allocation" in config and ":" in config["allocation"] else 0.7)
    parts.add(compressor.plan.microbatch)
    for target in compressor.targets:
        found[f"{name} {target.name}"] = target.weight.detach().contiguous()
        own = compressor.fisher.sums[target.name].full()
        everyone = Processes(accelerator)
        found[f"{name} {target.name} sums"] = everyone.assemble(own, block_shares(target, everyone)).contiguous()
assert parts & {2, 3}, parts
if accelerator.is_main_process:
    save_file(found, sys.argv[1])
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The script, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    script = folder / "everything.py"
    script.write_text(EVERYTHING)
    launch(1, str(folder / "1.safetensors"), script=script)
    return script, load_file(folder / "1.safetensors")


def assert_same(expected, found):
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_four_processes_give_the_sums_and_weights_of_one(alone, tmp_path):
    script, expected = alone
    launch(4, str(tmp_path / "found.safetensors"), script=script)
    assert_same(expected, load_file(tmp_path / "found.safetensors"))


def test_processes_that_accelerate_has_not_connected_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Clusters may set WORLD_SIZE alone.
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert processes(0, 1).world == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(
        CAPError, match="2 processes were launched, but accelerate has not connected them: without GPUs"
    ):
        processes(0, 1)
    assert processes(1, 2).world == 2


def test_two_machines(alone, tmp_path):
    script, expected = alone
    machines = launch_machines(script, str(tmp_path / "found.safetensors"), ACCELERATE_USE_CPU="true")
    errors = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert_same(expected, load_file(tmp_path / "found.safetensors"))


def test_a_shuffling_dataloader_is_shared_without_overlap(tmp_path):
    (tmp_path / "shuffled.py").write_text(SHUFFLED)
    launch(2, script=tmp_path / "shuffled.py")
