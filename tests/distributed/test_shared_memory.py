"""What processes of one machine send through memory that they share is what a backend would send."""

import os

import pytest
from support.launching import launch, launch_machines

from cap_hf.distributed.processes import Processes
from cap_hf.distributed.shared_memory import close, open_shared_memory, opened

# Every process knows what each sends. One of them is slow at random, and rounds grow.
SENDING = """
import gc
import glob
import os
import random
import sys
import time
import torch
from accelerate import Accelerator
from cap_hf.distributed.processes import Processes
from cap_hf.distributed.shared_memory import SLOTS, open_shared_memory

accelerator = Accelerator(cpu=True)
everyone = Processes(accelerator)
rank, world = everyone.rank, everyone.world
shared = open_shared_memory(everyone)
assert shared is not None
known, own = random.Random(0), random.Random(rank)

def entries(number, sender, to, size, dtype):
    return (torch.arange(size) * 7 + 31 * number + 5 * sender + to).remainder(101).to(dtype)

def check(number, sizes, dtype, arrived):
    if own.random() < 0.3:
        time.sleep(own.random() / 100)
    for sender, part in enumerate(arrived()):
        expected = entries(number, sender, rank, sizes[sender][rank], dtype)
        assert part.dtype == dtype
        assert part.equal(expected), (number, sender)

waiting, number = [], 0
for target in range(12):
    dtype, most = known.choice([torch.float32, torch.bfloat16, torch.float64]), known.randrange(1, 3000)
    for _ in range(known.randrange(1, 9)):
        sizes = [[known.choice([0, most, known.randrange(most + 1)]) for _ in range(world)] for _ in range(world)]
        assert shared.fits(most * dtype.itemsize)
        rooms = shared.room(sizes[rank], dtype)
        for to, room in enumerate(rooms):
            room.copy_(entries(number, rank, to, sizes[rank][to], dtype))
        waiting.append((number, sizes, dtype, shared.send([each[rank] for each in sizes], dtype)))
        number += 1
        if len(waiting) > 1:
            check(*waiting.pop(0))
    # As at the end of a target.
    while waiting:
        check(*waiting.pop(0))
assert number > 2 * SLOTS
# Tensors hold the memory that they lie in.
del shared, rooms, room
gc.collect()
assert not any("cap_hf" in os.readlink(each) for each in glob.glob("/proc/self/fd/*") if os.path.islink(each))
accelerator.end_training()
"""


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no files in memory")
@pytest.mark.parametrize("processes", [2, 3])
def test_each_reads_what_the_others_have_written(tmp_path, processes):
    (tmp_path / "sending.py").write_text(SENDING)
    launch(processes, script=tmp_path / "sending.py")


# Something is in the way of one process alone: none of them gets any.
REFUSED = """
import glob
import os
import sys
from accelerate import Accelerator
from cap_hf.distributed import shared_memory
from cap_hf.distributed.processes import Processes

accelerator = Accelerator(cpu=True)
everyone = Processes(accelerator)
if everyone.rank == 1 and sys.argv[1] == "no file":
    del os.memfd_create
elif everyone.rank == 1 and sys.argv[1] == "not allowed":

    def refuse(name):
        raise PermissionError

    os.memfd_create = refuse
elif everyone.rank == 1 and sys.argv[1] == "unreadable":
    shared_memory.opened = lambda path, mark: -1
assert shared_memory.open_shared_memory(everyone) is None
assert not any("cap_hf" in os.readlink(each) for each in glob.glob("/proc/self/fd/*") if os.path.islink(each))
accelerator.end_training()
"""


@pytest.mark.parametrize("trouble", ["no file", "not allowed", "unreadable"])
def test_all_of_them_have_it_or_none(tmp_path, trouble):
    (tmp_path / "refused.py").write_text(REFUSED)
    launch(2, trouble, script=tmp_path / "refused.py")


def test_on_several_machines_there_is_none(tmp_path):
    (tmp_path / "refused.py").write_text(REFUSED)
    for each in launch_machines(tmp_path / "refused.py", "two machines"):
        _, errors = each.communicate(timeout=120)
        assert each.returncode == 0, errors


def test_alone_there_is_none():
    assert open_shared_memory(Processes()) is None


def test_a_file_is_known_by_its_mark(tmp_path):
    (tmp_path / "file").write_bytes(b"marked, and more")
    found = opened(str(tmp_path / "file"), b"marked")
    assert found >= 0
    assert opened(str(tmp_path / "file"), b"another") == opened(str(tmp_path / "none"), b"marked") == -1
    close([-1, found])
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(found)


# The system refuses one process to make its file longer, or to map one.
NO_ROOM = """
import mmap
import os
import sys
from accelerate import Accelerator
from cap_hf.distributed.processes import Processes
from cap_hf.distributed.shared_memory import open_shared_memory

def refuse(*args):
    raise OSError(12, "Cannot allocate memory")

everyone = Processes(Accelerator(cpu=True))
shared = open_shared_memory(everyone)
assert shared.fits(100)
if everyone.rank == 1:
    setattr(*((os, "ftruncate") if sys.argv[1] == "long" else (mmap, "mmap")), refuse)
assert shared.fits(50)
assert not shared.fits(10**6)
"""


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no files in memory")
@pytest.mark.parametrize("refused", ["long", "mapped"])
def test_all_of_them_have_room_or_none(tmp_path, refused):
    (tmp_path / "no_room.py").write_text(NO_ROOM)
    launch(2, refused, script=tmp_path / "no_room.py")
