"""Tensors on the disk that are used like a dict of tensors in memory."""

from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cap_hf.checkpoints.atomic import atomic_file
from cap_hf.errors import CAPError, reason
from cap_hf.method.sums import SymmetricSums


class DiskTensors(MutableMapping[str, torch.Tensor]):
    """One safetensors file per tensor, written whole or not at all, mapped into memory while it is read.

    Args:
        folder: made if need be.
        device: where tensors are read to.

    Raises:
        CAPError: the folder cannot be made; on writing: it is full or closed.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._closed(error) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        try:
            with atomic_file(self._path(name)) as path:
                save_file({"tensor": tensor.detach().cpu().contiguous()}, path)
        except CAPError as error:
            raise self._closed(error.__cause__ or error) from error

    def _closed(self, error: BaseException) -> CAPError:
        return CAPError(
            f"{self.folder} cannot be written ({reason(error)}): name another folder with --spill_dir, or with "
            "--output_dir where --checkpoint_every keeps it beside that"
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise KeyError(name)
        try:
            # By way of the CPU: safetensors knows no device such as cpu:0, and not every accelerator.
            return load_file(self._path(name))["tensor"].to(self.device)
        except (OSError, SafetensorError) as error:
            raise CAPError(f"{self._path(name)} cannot be read: {reason(error)}") from error

    def __contains__(self, name: object) -> bool:
        return self._path(str(name)).is_file()

    def __delitem__(self, name: str) -> None:
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class SpilledSums(Mapping[str, SymmetricSums]):
    """The sums of many targets, one target in memory at a time.

    Args:
        folder: of the files.
        sizes: for each target's name the side of its matrices.
        device: where they are read to.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], device: torch.device) -> None:
        self.sizes = sizes
        self.tensors = DiskTensors(folder, device)
        self._last: tuple[str, SymmetricSums] | None = None

    def update(self, sums: Mapping[str, SymmetricSums]) -> None:
        """Keep the sums of some of the targets.

        Raises:
            CAPError: the folder cannot be written.
        """
        for name, each in sums.items():
            for index, strip in enumerate(each.strips):
                self.tensors[f"{name}.{index}"] = strip

    def __getitem__(self, name: str) -> SymmetricSums:
        if self._last is None or self._last[0] != name:
            self._last = None
            strips: list[torch.Tensor] = []
            while not strips or strips[-1].shape[2] < self.sizes[name]:
                strips.append(self.tensors[f"{name}.{len(strips)}"])
            self._last = name, SymmetricSums(self.sizes[name], strips)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)
