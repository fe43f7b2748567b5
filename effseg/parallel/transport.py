"""How the processes that share a volume talk: rows to single neighbours, a few numbers to all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from effseg.errors import LostProcess

LOST = (
    "a process of the group that shares a volume has ended, or does not answer: this one cannot go on "
    "without it"
)


class Message(NamedTuple):
    """A tensor to or from process `peer` of the group, contiguous."""

    peer: int
    tensor: Tensor


class Pending(Protocol):
    def wait(self) -> Any: ...


class Transport(Protocol):
    """rank: of this process among `size`."""

    rank: int
    size: int

    def exchange(self, sent: Sequence[Message], received: Sequence[Message]) -> Sequence[Pending]:
        """Begin to send tensors and to fill others; a pair of processes names theirs in the same order."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, all of one shape, in the order of ranks."""

    def tell(self, image: Tensor, numbers: Sequence[int]) -> list[list[int]]:
        """Every process's rows of an image, then its other numbers, in the order of ranks."""


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except LostProcess:
        raise
    except RuntimeError as error:  # torch's errors of backends are of this kind
        raise LostProcess(f"{LOST} ({str(error).strip().splitlines()[0]})") from error


class _Work:
    """Of torch's, which gloo's may be waited for only once."""

    def __init__(self, work: Any) -> None:
        self._work: Any = work

    def wait(self) -> None:
        if self._work is not None:
            with _told():
                self._work.wait()
            self._work = None


class Processes:
    """A group of torch.distributed's, gloo or NCCL."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._begun: list[_Work] = []

    def finish(self) -> None:
        """Wait until what was begun has been sent: a backend forgets what nobody waits for."""
        for work in self._begun:
            work.wait()
        self._begun.clear()

    def exchange(self, sent: Sequence[Message], received: Sequence[Message]) -> Sequence[Pending]:
        operations = [
            dist.P2POp(post, message.tensor, dist.get_global_rank(self.group, message.peer), self.group)
            for post, messages in ((dist.isend, sent), (dist.irecv, received))
            for message in messages
        ]
        self.finish()
        with _told():
            self._begun = [_Work(w) for w in dist.batch_isend_irecv(operations)] if operations else []
        return list(self._begun)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        tensor = tensor.contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self.finish()
        with _told():
            dist.all_gather(found, tensor, self.group)
        return found

    def tell(self, image: Tensor, numbers: Sequence[int]) -> list[list[int]]:
        told = torch.tensor([image.shape[-3], *numbers], dtype=torch.int64, device=image.device)
        return [found.tolist() for found in self.gather(told)]


class Pretended:
    """A group of which this process is `rank` and the others do not exist, for steps on fake tensors.

    rows: of the volume; sent: bytes that this process sends, summed up; messages: how many tensors.
    """

    def __init__(self, rank: int, size: int, rows: int) -> None:
        self.rank, self.size, self.rows = rank, size, rows
        self.sent = self.messages = 0

    def exchange(self, sent: Sequence[Message], received: Sequence[Message]) -> Sequence[Pending]:
        self.sent += sum(message.tensor.nbytes for message in sent)
        self.messages += len(sent)
        return []

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.sent += tensor.nbytes * (self.size - 1)
        self.messages += self.size - 1
        return [tensor.clone() for _ in range(self.size)]

    def tell(self, image: Tensor, numbers: Sequence[int]) -> list[list[int]]:
        starts = [rank * self.rows // self.size for rank in range(self.size + 1)]
        return [[stop - start, *numbers] for start, stop in pairwise(starts)]
