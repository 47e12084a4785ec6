"""Collectives of the device, over gloo: as strict as NCCL's."""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

NAME = "pretend_nccl"
# What NCCL knows.
DTYPES = {torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64}
DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}

Tensors = list[torch.Tensor]


def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> "PretendNCCL":
    """Make a process group, as `torch.distributed` asks a backend to."""
    return PretendNCCL(store, rank, size, timeout)


class Transfer(dist._Work):
    """A collective on its way: results arrive, and inputs may be written to again, when it is waited for.

    Args:
        work: of gloo, on copies.
        results: copies of results and where they belong.
        inputs: copies of inputs and where they are from.
    """

    def __init__(
        self,
        work: dist.Work,
        results: list[tuple[torch.Tensor, torch.Tensor]],
        inputs: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        super().__init__()
        self._work, self._results, self._inputs = work, results, inputs
        self._arrived = False

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self._arrived:
            self._work.wait()
            self._arrived = True
            for copy, tensor in self._inputs:
                if not torch.equal(_bytes(copy), _bytes(_host(tensor))):
                    raise RuntimeError("the input of a collective was written to before the collective was waited for")
            for copy, tensor in self._results:
                _host(tensor).copy_(copy.view(tensor.shape))
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._arrived

    def get_future(self) -> torch.futures.Future:
        self.wait()
        future = torch.futures.Future()
        future.set_result([tensor for _, tensor in self._results])
        return future


class PretendNCCL(dist.ProcessGroup):
    """Takes contiguous tensors of the device, of the dtypes that NCCL knows."""

    _device_types = (torch.device("pretend"),)

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._names = {"group": "", "description": ""}

    def getBackendName(self) -> str:
        return NAME

    def setGroupName(self, name: str) -> None:
        self._names["group"] = name

    def getGroupName(self) -> str:
        return self._names["group"]

    def setGroupDesc(self, description: str) -> None:
        self._names["description"] = description

    def getGroupDesc(self) -> str:
        return self._names["description"]

    def allreduce(self, tensors: Tensors, opts: Any) -> Transfer:
        return _in_place(tensors, lambda copies: self._gloo.allreduce(copies, opts))

    def broadcast(self, tensors: Tensors, opts: Any) -> Transfer:
        return _in_place(tensors, lambda copies: self._gloo.broadcast(copies, opts))

    def reduce(self, tensors: Tensors, opts: Any) -> Transfer:
        return _in_place(tensors, lambda copies: self._gloo.reduce(copies, opts))

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Transfer:
        return _out_of_place(outputs[0], inputs, lambda received, sent: self._gloo.allgather([received], sent, opts))

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> Transfer:
        def run(received: Tensors, sent: Tensors) -> dist.Work:
            # NCCL looks at numbers of entries alone, gloo at shapes.
            return self._gloo._allgather_base(received[0].view(-1), sent[0].view(-1), opts)

        return _out_of_place([output], [input], run)

    _allgather_base = all_gather_single

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Transfer:
        def run(received: Tensors, sent: Tensors) -> dist.Work:
            return self._gloo.gather([received] if outputs else [], sent, opts)

        return _out_of_place(outputs[0] if outputs else [], inputs, run)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Transfer:
        def run(received: Tensors, sent: Tensors) -> dist.Work:
            return self._gloo.scatter(received, [sent] if inputs else [], opts)

        return _out_of_place(outputs, inputs[0] if inputs else [], run)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        opts: Any,
    ) -> Transfer:
        return _out_of_place(
            [output],
            [input],
            lambda received, sent: self._gloo.alltoall_base(received[0], sent[0], output_sizes, input_sizes, opts),
        )

    alltoall_base = all_to_all_single

    def send(self, tensors: Tensors, rank: int, tag: int) -> Transfer:
        return _out_of_place([], tensors, lambda received, sent: self._gloo.send(sent, rank, tag))

    def recv(self, tensors: Tensors, rank: int, tag: int) -> Transfer:
        return _out_of_place(tensors, [], lambda received, sent: self._gloo.recv(received, rank, tag))

    def barrier(self, opts: Any) -> dist.Work:
        return self._gloo.barrier()


def _in_place(tensors: Tensors, run: Callable[[Tensors], dist.Work]) -> Transfer:
    _check(tensors)
    copies = [_host(tensor).clone() for tensor in tensors]
    # The copies go to gloo, which writes its results into them: what was sent is kept in others.
    inputs = [(copy.clone(), tensor) for copy, tensor in zip(copies, tensors, strict=True)]
    return Transfer(run(copies), list(zip(copies, tensors, strict=True)), inputs)


def _out_of_place(outputs: Tensors, inputs: Tensors, run: Callable[[Tensors, Tensors], dist.Work]) -> Transfer:
    _check([*outputs, *inputs])
    received = [torch.empty_like(_host(tensor)) for tensor in outputs]
    sent = [_host(tensor).clone() for tensor in inputs]
    work = run(received, sent)
    return Transfer(work, list(zip(received, outputs, strict=True)), list(zip(sent, inputs, strict=True)))


def _check(tensors: Iterable[torch.Tensor]) -> None:
    """Raise what NCCL raises."""
    for tensor in tensors:
        if tensor.device.type != "pretend" or tensor.is_sparse:
            raise ValueError(f"Tensors must be of the pretend device and dense, one is on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError("Tensors must be contiguous")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"Input tensor data type is not supported for NCCL process group: {tensor.dtype}")


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor of the device, as a CPU tensor."""
    return torch.ops.pretend.host(tensor.detach())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)
