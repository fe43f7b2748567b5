"""One process, or one of several that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from effseg.common.device import find_device
from effseg.errors import InputError
from effseg.parallel import data_group, mesh, split

# Long, since processes wait for each other while a first run prepares a large data set.
TIMEOUT = timedelta(hours=6)

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes, and the device on which it computes."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """Of data x volume, where processes share volumes."""
    group: Any = None
    """Of torch.distributed; None: all processes."""

    @property
    def share_of_volume(self) -> int:
        """This process's place among those that share its volume."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("volume")

    @cached_property
    def volumes(self) -> World:
        """The processes that hold the same part of other volumes, as a world of their own."""
        if self.mesh is None:
            return self
        group = data_group(self.mesh)
        return World(dist.get_rank(group), dist.get_world_size(group), self.device, group=group)

    @property
    def loss_group(self) -> Any:
        """Over whose processes a loss's sums are taken: see `effseg.losses.dice_cross_entropy`."""
        if not self.volumes.several:
            return None
        return True if self.mesh is None else self.volumes.group

    def splitting(self) -> AbstractContextManager[None]:
        """Inside, networks compute this process's rows of its volume."""
        return nullcontext() if self.mesh is None else split(self.mesh)

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def share(self, items: list[Value]) -> list[Value]:
        """This process's part of `items`; `gather` puts the parts' results back in order."""
        return items[self.rank :: self.size]

    def gather(self, values: list[Value]) -> list[Value]:
        """Every process's `values`, one for each item of its `share`, in the items' order."""
        if not self.several:
            return values
        parts: list[list[Value]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, values, self.group)
        longest = max(map(len, parts))
        return [part[place] for place in range(longest) for part in parts if place < len(part)]

    def fail_together(self, errors: list[str]) -> None:
        """Raise InputError in every process, with the first message, when any process has one."""
        every = self.gather(errors)
        if every:
            raise InputError(every[0])

    def on_main(self, action: Callable[[], None]) -> None:
        """Let the first process do `action` while the others wait; its InputError is raised in all."""
        errors = []
        if self.is_main:
            try:
                action()
            except InputError as error:
                errors.append(str(error))
        self.fail_together(errors)

    def from_main(self, action: Callable[[], Value]) -> Value:
        """What the first process's `action` returns, in every process; its InputError is raised in all."""
        found: list[Any] = [None]
        self.on_main(lambda: found.insert(0, action()))
        value: Value = self.gather(found[:1])[0]
        return value

    def barrier(self) -> None:
        if self.several:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


@contextmanager
def join_world(device: str, split_volume: int = 1) -> Iterator[World]:
    """Join the processes that torchrun started (its environment variables say so), else stand alone.

    device: "auto", "cpu", "cuda" or "cuda:N". Several processes use gloo on CPUs and nccl on GPUs, one
    GPU each. split_volume: how many share a volume. Raises InputError for a device that is not there, and
    where the processes cannot be divided so.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % split_volume:
        raise InputError(
            f"split_volume: expected a divisor of {size} processes (torchrun), got {split_volume}"
        )
    chosen = find_device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        shared = None if split_volume == 1 else mesh(split_volume, size // split_volume, chosen.type)
        yield World(int(os.environ["RANK"]), size, chosen, shared)
    finally:
        dist.destroy_process_group()
