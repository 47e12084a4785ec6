"""The state of a collection on the disk, from which a run that was killed goes on as if it had not been."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError, reason
from cap_hf.method.fisher import Batch, BlockFisher

Item = tuple[Batch, int, torch.Tensor | None]


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


class CollectionState:
    """Saves the sums, their count and the place among the examples of a collection, and finds them again.

    A save is whole or not there; the one before goes when every process has its own.

    Args:
        checkpointing: where and how often.
        processes: of the run.
        facts: what must be the same for a run to go on, by name.
        plan: what the passes are, as JSON; on resuming that of the interrupted run takes its place.

    Raises:
        CAPError: what is there is of another run, or may not be replaced.
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
        there = described.is_file()
        if any(processes.gather_ints(int(there))[rank] != [int(there)] for rank in range(processes.world)):
            there = False
        if there and not checkpointing.resume:
            raise CAPError(f"{self.root} has the state of an interrupted run: go on with --resume, or remove it")
        # JSON knows no tuples.
        facts = json.loads(json.dumps(facts))
        if there:
            before = json.loads(described.read_text())
            self._compare(before["facts"], facts)
            self.plan = before["plan"]
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.plan = json.loads(json.dumps(plan))
        self._write(described, {"facts": facts, "plan": self.plan})

    def _compare(self, before: dict[str, object], now: dict[str, object]) -> None:
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                values = f": {before.get(name)} there, {now.get(name)} here"
                raise CAPError(
                    f"{self.root} has the state of another run, {name} differs{'' if 'weights' in name else values}"
                )

    @staticmethod
    def _write(path: Path, values: dict) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(values))
        os.replace(partial, path)

    def passes(self) -> list[dict]:
        """What `finish_pass` was told of the passes that all processes have finished."""
        finished = 0
        while (self.folder / f"pass-{finished}.json").is_file():
            finished += 1
        finished = min(each for (each,) in self.processes.gather_ints(finished))
        return [json.loads((self.folder / f"pass-{number}.json").read_text()) for number in range(finished)]

    def begin_pass(self, number: int, fisher: BlockFisher, examples: Iterable[Item]) -> Iterator[Item]:
        """The examples that are left of a pass, after its sums are put back into `fisher`.

        Raises:
            CAPError: on reading on: the examples before them are not those of the interrupted run.
        """
        self.digest, self._steps, self._since = hashlib.blake2b(), 0, 0
        newest = max((int(path.name.split("-")[2]) for path in self._saves(number)), default=0)
        steps = min(each for (each,) in self.processes.gather_ints(newest))
        expected = None
        if steps:
            folder = self.folder / f"step-{number}-{steps}"
            place = json.loads((folder / "place.json").read_text())
            fisher.count, expected, self._steps = place["count"], place["digest"], steps
            for index, target in enumerate(fisher.targets):
                saved = load_file(folder / f"{index}.safetensors")
                for key, strip in enumerate(fisher.sums[target.name].strips):
                    strip.copy_(saved[str(key)])
        return self._rest(examples, steps, expected)

    def _rest(self, examples: Iterable[Item], steps: int, expected: str | None) -> Iterator[Item]:
        stream = iter(examples)
        for _ in range(steps):
            # A process may have had fewer examples than there were steps.
            item = next(stream, None)
            if item is None:
                break
            self._note(item)
        if expected is not None and self.digest.hexdigest() != expected:
            raise CAPError(
                f"{self.root} has the state of another run, the examples differ: the dataset, its order, the batch "
                "size or the image processor is another"
            )
        for item in stream:
            self._note(item)
            yield item

    def _note(self, item: Item) -> None:
        batch, samples, uniforms = item
        self.digest.update(f"{samples}".encode())
        for tensor in (*batch.values(), uniforms):
            if tensor is not None:
                self.digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())

    def saving(self, number: int, fisher: BlockFisher, advance: Callable[[int], None]) -> Callable[[int], None]:
        """What is called after each step: counts it, saves where it is time, and passes it on."""

        def on_step(samples: int) -> None:
            self._steps += 1
            self._since += samples
            if self._since >= self.every:
                self.save(number, fisher)
            advance(samples)

        return on_step

    def save(self, number: int, fisher: BlockFisher) -> None:
        """Write the sums and the place of a pass."""
        self._since = 0
        final = self.folder / f"step-{number}-{self._steps}"
        if not final.exists():
            self._write_save(fisher, final)
        self.processes.gather_ints(0)
        for path in self._saves():
            if path != final:
                shutil.rmtree(path, ignore_errors=True)

    def _write_save(self, fisher: BlockFisher, final: Path) -> None:
        partial = self.folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            for index, target in enumerate(fisher.targets):
                strips = {str(key): strip.cpu() for key, strip in enumerate(fisher.sums[target.name].strips)}
                save_file(strips, partial / f"{index}.safetensors")
            self._write(partial / "place.json", {"count": fisher.count, "digest": self.digest.hexdigest()})
            os.replace(partial, final)
        except (OSError, SafetensorError) as error:
            raise CAPError(f"the state cannot be written to {self.root}: {reason(error)}") from error

    def finish_pass(self, number: int, facts: dict) -> None:
        """Note that a pass is done and its sums lie where they stay."""
        self._write(self.folder / f"pass-{number}.json", facts)
        self.processes.gather_ints(0)
        for path in self._saves():
            shutil.rmtree(path, ignore_errors=True)

    def _saves(self, number: int | None = None) -> list[Path]:
        return list(self.folder.glob(f"step-{'*' if number is None else number}-*"))

    def remove(self) -> None:
        """The run is over: leave nothing."""
        self.processes.gather_ints(0)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.processes.gather_ints(0)
        if self.processes.rank == 0:
            shutil.rmtree(self.root, ignore_errors=True)


def hash_weights(model: nn.Module) -> str:
    """Changes with any parameter or buffer of a model."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
