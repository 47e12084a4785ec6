"""Which targets are collected in which pass, by what their sums and the hidden states between passes take in memory."""

from collections.abc import Callable, Sequence

from cap_hf.collection import input_sums
from cap_hf.collection.exchange import made_in
from cap_hf.collection.parts import parts_of
from cap_hf.collection.shares import chunk_shares, part_of
from cap_hf.collection.stretches import Chain, kept_bytes, stretch_of
from cap_hf.distributed.processes import Processes
from cap_hf.method.sums import sums_per_block
from cap_hf.targets import Target

# A target or a part of one, and the bytes of its sums in the process that has most of them.
Piece = tuple[Target, int]


def in_parts(target: Target, room: int, processes: Processes, prior: bool) -> list[Piece]:
    """Return a target in as few parts as have sums of no more than `room` bytes each; none where a chunk has more."""
    shares = chunk_shares(target, processes)
    # Of its inputs a part has all.
    least, block = sums_bytes(target, 0, prior), sums_bytes(target, 1)

    def sizes(count: int) -> list[int]:
        """Return the bytes of each of so many parts, in the process that has most of it."""
        parts = [[part_of(share, number, count) for share in shares] for number in range(count)]
        rows = [max(each[-1].stop - each[0].start if each else 0 for each in part) for part in parts]
        return [least + block * (each * target.row_size // target.block_size) for each in rows]

    finest = max(map(len, shares))
    if room <= least or max(sizes(finest)) > room:
        return []
    # Fewer than these are too large, whatever their chunks.
    count = max(2, -(-(sizes(1)[0] - least) // (room - least)))
    while max(found := sizes(count)) > room:
        count += 1
    return list(zip(parts_of(target, count), found, strict=True))


def split_passes(pieces: Sequence[Piece], room: int) -> list[list[Piece]]:
    """Return pieces in as few runs as have no more than `room` bytes each, none of which alone has more.

    No run has two parts of one target.
    """
    passes: list[list[Piece]] = [[]]
    held = 0
    for target, size in pieces:
        if passes[-1] and (held + size > room or passes[-1][-1][0].name == target.name):
            passes.append([])
            held = 0
        passes[-1].append((target, size))
        held += size
    return passes


def split_keeping(
    pieces: Callable[[int], list[Piece]], room: int, chains: Sequence[Chain], samples: int, stride: int
) -> tuple[list[list[Piece]], int] | None:
    """Return pieces as `split_passes` does, in what room is left beside hidden states; and the bytes of these.

    Args:
        pieces: gives those that each fit into some room; none where that cannot be.
        room: bytes for sums and states.
        chains: layers that can be gone through alone; none where nothing is kept.
        samples: how many gradient samples are kept.
        stride: of every how many layers.

    Returns:
        None where there are none.
    """
    states = 0
    while found := pieces(room - states):
        passes = split_passes(found, room - states)
        stretches = (stretch_of(chains, [target for target, _ in each], stride) for each in passes)
        needed = samples * kept_bytes(stretches)
        if needed <= states:
            return passes, needed
        # With more passes there are more places in the model that states are kept of.
        states = needed
    return None


def sums_bytes(target: Target, blocks: int, prior: bool = False) -> int:
    """Return the bytes of the sums of some blocks of a target, and of those of its inputs if there is a prior."""
    own = blocks * sums_per_block(target.block_size) * made_in(target).itemsize
    return own + (input_sums.held_bytes(target) if prior else 0)
