"""One process, or one of several that torchrun started."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from effseg.common.device import find_device
from effseg.errors import InputError

# Long, since processes wait for each other while a first run prepares a large data set.
TIMEOUT = timedelta(hours=6)

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes, and the device on which it computes."""

    rank: int
    size: int
    device: torch.device

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
        dist.all_gather_object(parts, values)
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
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started (its environment variables say so), else stand alone.

    device: "auto", "cpu", "cuda" or "cuda:N". Several processes use gloo on CPUs and nccl on GPUs, one
    GPU each. Raises InputError for a device that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = find_device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(int(os.environ["RANK"]), size, chosen)
    finally:
        dist.destroy_process_group()
