"""The state of a collection on the disk, from which a run that was killed goes on as if it had not been."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cap_hf.checkpoints.atomic import atomic_directory, write_json
from cap_hf.checkpoints.places import writing
from cap_hf.checkpoints.replacing import is_empty
from cap_hf.collection.running import Batch
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.targets import Target

Item = tuple[Batch, int, torch.Tensor | None]
# Lies in a folder that holds the states of a run, and in no other.
MARK = "cap_hf-collection.json"
# What this process holds, for as long as it lives: a collection that was interrupted in it can go on in it.
LOCKS: dict[Path, TextIO] = {}


@dataclass
class Checkpointing:
    """Where a collection keeps its state.

    Attributes:
        folder: of the state; nothing else may be in it. Each process has its own part of it.
        every: gradient samples between two saves.
        resume: go on from what is there.
    """

    folder: Path
    every: int
    resume: bool = False

    def __post_init__(self) -> None:
        # A path may be typed as a string.
        self.folder = Path(self.folder)


class Statistic(Protocol):
    """What a state saves and finds again: what was summed of each target, and of how many gradient samples."""

    targets: list[Target]
    count: int

    def strips(self, target: Target) -> list[torch.Tensor]:
        """Return the tensors themselves, in an order that is always the same."""


class CollectionState:
    """Saves the sums, their count and the place among the examples of a collection, and finds them again.

    A save is whole or not there; the one before goes when every process has its own.

    Args:
        checkpointing: where and how often.
        processes: of the run.
        facts: what must be the same for a run to go on, by name.
        plan: what the passes are, as JSON; on resuming that of the interrupted run takes its place.

    Raises:
        CAPError: what is there is of another run, of a part of the processes, is no state, or may not be replaced.
    """

    def __init__(
        self, checkpointing: Checkpointing, processes: Processes, facts: dict[str, object], plan: dict
    ) -> None:
        self.every, self.processes = checkpointing.every, processes
        self.root = checkpointing.folder
        self.folder = self.root / f"rank-{processes.rank}"
        self.digest = hashlib.blake2b()
        self._steps, self._since = 0, 0
        described = self.folder / "run.json"
        there = self._look(described, checkpointing.resume)
        # JSON knows no tuples.
        facts, self.plan = json.loads(json.dumps([facts, plan]))
        if there:
            try:
                before = json.loads(described.read_text())
                self._compare(before["facts"], facts)
                self.plan = before["plan"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, CAPError):
                    raise
                raise CAPError(f"{described} cannot be read: remove {self.root} and begin anew") from error
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        write_json(described, {"facts": facts, "plan": self.plan})

    def _look(self, described: Path, resume: bool) -> bool:
        """Take the folder for this run; return whether it has the state of an interrupted one.

        What each process sees is gathered before any of them decides: all of them take the same way.

        Raises:
            CAPError: the folder is somebody else's, another run uses it, or its state is not one to go on from.
        """
        if any(foreign for (foreign,) in self.processes.gather_ints(int(is_foreign(self.root)))):
            raise CAPError(f"{self.root} holds something else than a collection's state: choose another --output_dir")
        write_json(self.root / MARK, {"about": "the state of a cap_hf collection; it goes when the run is over"})
        own = [int(self._is_locked()), int(described.is_file()), int(any(self.root.glob("rank-*/run.json")))]
        busy, there, any_there = (sum(values) for values in zip(*self.processes.gather_ints(*own), strict=True))
        if busy:
            raise CAPError(f"another run is using {self.root}: wait for it, or choose another --output_dir")
        if any_there and not resume:
            raise CAPError(f"{self.root} has the state of an interrupted run: go on with --resume, or remove it")
        if any_there and there < self.processes.world:
            raise CAPError(
                f"{self.root} has the state of {there} of {self.processes.world} processes, or of more: remove it and "
                "begin anew, or go on with as many as there were"
            )
        return bool(there)

    def _is_locked(self) -> bool:
        """Return whether another process holds this one's part of the folder; hold it from now on if not."""
        path = self._lock_path
        if path in LOCKS:
            return False
        with writing(self.root):
            lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return True
        except OSError:  # a file system without locks: nobody's run can be told there
            pass
        LOCKS[path] = lock
        return False

    @property
    def _lock_path(self) -> Path:
        return (self.root / f"{self.folder.name}.lock").resolve()

    def _compare(self, before: dict[str, object], now: dict[str, object]) -> None:
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                values = f": {before.get(name)} there, {now.get(name)} here"
                raise CAPError(
                    f"{self.root} has the state of another run, {name} differs{'' if 'weights' in name else values}"
                )

    def passes(self) -> list[dict]:
        """Return what `finish_pass` was told of the passes that all processes have finished."""
        finished = 0
        while (self.folder / f"pass-{finished}.json").is_file():
            finished += 1
        finished = min(each for (each,) in self.processes.gather_ints(finished))
        return [json.loads((self.folder / f"pass-{number}.json").read_text()) for number in range(finished)]

    def check_examples(self, examples: Iterable[Item], expected: str) -> None:
        """Go through the examples of a pass that is finished, without the model.

        Raises:
            CAPError: they are not those of the interrupted run.
        """
        self.digest = hashlib.blake2b()
        for item in examples:
            note(self.digest, item)
        self._compare_examples(expected)

    def _compare_examples(self, expected: str) -> None:
        if self.digest.hexdigest() != expected:
            raise CAPError(
                f"{self.root} has the state of another run, the examples differ: the dataset, its order, the batch "
                "size or the image processor is another"
            )

    def begin_pass(self, number: int, statistic: Statistic, examples: Iterable[Item]) -> Iterator[Item]:
        """Put the saved sums of a pass back; return the examples that are left of it.

        Raises:
            CAPError: on reading on: the examples before them are not those of the interrupted run.
        """
        self.digest, self._steps, self._since = hashlib.blake2b(), 0, 0
        newest = max((int(path.name.split("-")[2]) for path in self._saves(number)), default=0)
        steps = min(each for (each,) in self.processes.gather_ints(newest))
        expected = None
        if steps:
            folder = self.folder / f"step-{number}-{steps}"
            try:
                place = json.loads((folder / "place.json").read_text())
                statistic.count, expected, self._steps = place["count"], place["digest"], steps
                for index, target in enumerate(statistic.targets):
                    saved = load_file(folder / f"{index}.safetensors")
                    for key, strip in enumerate(statistic.strips(target)):
                        strip.copy_(saved[str(key)])
            except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
                raise CAPError(f"{folder} cannot be read: remove {self.root} and begin anew") from error
        return self._rest(examples, steps, expected)

    def begin_kept_pass(self, digest: "hashlib.blake2b", steps: int) -> None:
        """Begin a pass that needs no examples: it is saved when it is over, as one of so many steps through them."""
        self.digest, self._steps, self._since = digest, steps, 0

    def _rest(self, examples: Iterable[Item], steps: int, expected: str | None) -> Iterator[Item]:
        stream = iter(examples)
        for _ in range(steps):
            # A process may have had fewer examples than there were steps.
            item = next(stream, None)
            if item is None:
                break
            note(self.digest, item)
        if expected is not None:
            self._compare_examples(expected)
        for item in stream:
            note(self.digest, item)
            yield item

    def saving(self, number: int, statistic: Statistic, advance: Callable[[int], None]) -> Callable[[int], None]:
        """Return what is called after each step: it counts it, saves where it is time, and passes it on."""

        def on_step(samples: int) -> None:
            self._steps += 1
            self._since += samples
            if self._since >= self.every:
                self.save(number, statistic)
            advance(samples)

        return on_step

    def save(self, number: int, statistic: Statistic) -> None:
        """Write the sums and the place of a pass.

        Raises:
            CAPError: the folder cannot be written.
        """
        self._since = 0
        final = self.folder / f"step-{number}-{self._steps}"
        if not final.exists():
            with atomic_directory(final) as folder:
                for index, target in enumerate(statistic.targets):
                    strips = {str(key): strip.cpu() for key, strip in enumerate(statistic.strips(target))}
                    save_file(strips, folder / f"{index}.safetensors")
                place = {"count": statistic.count, "digest": self.digest.hexdigest()}
                (folder / "place.json").write_text(json.dumps(place))
        self.processes.gather_ints(0)
        for path in self._saves():
            if path != final:
                shutil.rmtree(path, ignore_errors=True)

    def finish_pass(self, number: int, facts: dict) -> None:
        """Note that a pass is done and its sums are where the elimination reads them."""
        write_json(self.folder / f"pass-{number}.json", facts | {"digest": self.digest.hexdigest()})
        self.processes.gather_ints(0)
        for path in self._saves():
            shutil.rmtree(path, ignore_errors=True)

    def _saves(self, number: int | None = None) -> list[Path]:
        return list(self.folder.glob(f"step-{'*' if number is None else number}-*"))

    def remove(self) -> None:
        """Remove all that the run has left, and nothing else: it is over."""
        self.processes.gather_ints(0)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        if self._lock_path in LOCKS:
            LOCKS.pop(self._lock_path).close()
        self.processes.gather_ints(0)
        if self.processes.rank == 0:
            (self.root / MARK).unlink(missing_ok=True)
            if self.root.is_dir() and not self.root.is_symlink() and not any(self.root.iterdir()):
                with suppress(OSError):  # a mount point stays, and a folder whose parent may not be written
                    self.root.rmdir()


def note(digest: "hashlib.blake2b", item: Item) -> None:
    """Let a digest change with the examples of a step, and with what is random in their loss."""
    batch, samples, draws = item
    digest.update(f"{samples}".encode())
    for tensor in (*batch.values(), draws):
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def is_foreign(folder: Path) -> bool:
    """Return whether a folder is there that holds something, and is not marked as a state's."""
    return os.path.exists(folder) and not (folder / MARK).is_file() and not (folder.is_dir() and is_empty(folder))


def hash_weights(model: nn.Module) -> str:
    """Return what changes with any parameter or buffer of a model."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
