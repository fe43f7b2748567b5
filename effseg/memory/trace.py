"""The allocations and frees of a training step in their order, to be replayed by a caching allocator."""

from __future__ import annotations

from typing import NamedTuple

from effseg.memory.allocator import Block, CachingAllocator

# cuDNN asks for scratch where it lays its operands out anew, and where a weight gradient is added up in
# parts. How much depends on the kernel that it picks. Reckoned with are as many bytes as the convolution
# reads and writes, up to this.
LARGEST_WORKSPACE = 256 * 2**20

STEPS = 2  # the second begins with what the first one left cached

_FREE = -1  # in the place of bytes


class Reserved(NamedTuple):
    """Peaks of a replay in bytes: of blocks in use, and of what the allocator took from the driver."""

    allocated: int
    reserved: int


class Trace:
    """What lives before the first step, and a step, as (token, bytes) in order; a free is (token, _FREE)."""

    def __init__(self) -> None:
        self._before: list[tuple[int, int]] = []
        self._step: list[tuple[int, int]] = []
        self._events = self._before
        self._tokens = 0
        self.largest_workspace = 0

    def begin_step(self) -> None:
        """What was allocated until now stays."""
        self._events = self._step

    def allocate(self, nbytes: int) -> int:
        """A token to free it by."""
        self._tokens += 1
        self._events.append((self._tokens, nbytes))
        return self._tokens

    def free(self, token: int) -> None:
        self._events.append((token, _FREE))

    def workspace(self, nbytes: int) -> None:
        """Of an operator: taken, and given back when the operator has run."""
        nbytes = min(nbytes, LARGEST_WORKSPACE)
        self.largest_workspace = max(self.largest_workspace, nbytes)
        self.free(self.allocate(nbytes))

    def replay(self, expandable_segments: bool = False, steps: int = STEPS) -> Reserved:
        """The step again and again. The gradients that it leaves behind are freed before the next one."""
        allocator = CachingAllocator(expandable_segments)
        _run(self._before, allocator)
        for _ in range(steps):
            for block in _run(self._step, allocator):
                allocator.free(block)
        return Reserved(allocator.peak_allocated, allocator.reserved)


def _run(events: list[tuple[int, int]], allocator: CachingAllocator) -> list[Block | None]:
    """The blocks that are left; frees of what was allocated before are not followed."""
    live: dict[int, Block | None] = {}
    allocate, free = allocator.allocate, allocator.free
    for token, nbytes in events:
        if nbytes >= 0:
            live[token] = allocate(nbytes)
        elif token in live:
            free(live.pop(token))
    return list(live.values())
