"""Which blocks of a target, or of a part of it, each process owns; and the chunks of rows that gradients come in."""

import torch

from cap_hf.distributed.processes import Processes
from cap_hf.targets import Target

# Bytes of a chunk's gradients of `SAMPLES` gradient samples. On a CPU so few that they stay in the cache until they are
# summed; on other devices so many that a kernel has something to do.
CHUNK_BYTES, DEVICE_CHUNK_BYTES, SAMPLES = 8 * 2**20, 256 * 2**20, 64
# Rows of a chunk at least, enough for a matrix product; and chunks of a target, so many that shares are even.
CHUNK_ROWS, CHUNKS = 24, 16


def row_chunks(target: Target, device: torch.device) -> list[slice]:
    """Return a target's rows in chunks that are whole blocks, for gradients that are made on a device.

    Matrix products round differently for different shapes: chunks that are the same for any number of processes give
    the same sums, bit for bit.
    """
    rows = len(target.weight)
    size = CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    fitting = max(CHUNK_ROWS, size // (SAMPLES * 4 * target.row_size))
    height = min(max(min(CHUNK_ROWS, -(-rows // 4)), -(-rows // CHUNKS)), fitting)
    unit = max(1, target.block_size // target.row_size)
    height = -(-height // unit) * unit
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def chunk_blocks(target: Target, device: torch.device) -> int:
    """Return the most blocks that a chunk of a target has."""
    return chunk_weights(target, device) // target.block_size


def chunk_weights(target: Target, device: torch.device) -> int:
    """Return the most weights that a chunk of a target has."""
    return max(chunk.stop - chunk.start for chunk in row_chunks(target, device)) * target.row_size


def chunk_shares(target: Target, processes: Processes) -> list[list[slice]]:
    """Return the chunks of a target that each process owns; the larger shares go round with the targets.

    Of a part of a target, each process has that part of its own.
    """
    chunks = row_chunks(target, processes.device)
    return [part_of(chunks[share], *target.part) for share in processes.shares(len(chunks), target.index)]


def part_of(chunks: list[slice], number: int, count: int) -> list[slice]:
    """Return one of so many parts of what a process owns, which are alike in the number of chunks."""
    return chunks[len(chunks) * number // count : len(chunks) * (number + 1) // count]


def block_shares(target: Target, processes: Processes) -> list[slice]:
    """Return for each process the blocks of a target that it owns: those of its chunks."""
    shares, done = [], 0
    for chunks, every in zip(chunk_shares(target, processes), chunk_shares(target.whole, processes), strict=True):
        # What is empty lies where the process's blocks begin.
        begin, end = (every[0].start, every[-1].stop) if every else (done, done)
        rows = (chunks[0].start, chunks[-1].stop) if chunks else (begin, begin)
        shares.append(slice(*(row * target.row_size // target.block_size for row in rows)))
        done = end
    return shares


def own_blocks(target: Target, processes: Processes) -> slice:
    """Return the blocks of a target that this process owns: its share."""
    return block_shares(target, processes)[processes.rank]


def largest_shares(targets: list[Target], processes: Processes) -> list[int]:
    """Return how many blocks of each target the process owns that owns the most weights of all targets together."""
    shares = [[share.stop - share.start for share in block_shares(target, processes)] for target in targets]
    weights = [
        sum(blocks[rank] * target.block_size for target, blocks in zip(targets, shares, strict=True))
        for rank in range(processes.world)
    ]
    heaviest = weights.index(max(weights))
    return [blocks[heaviest] for blocks in shares]
