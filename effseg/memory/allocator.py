"""What PyTorch's caching allocator reserves on a GPU for given allocations and frees.

A tensor's memory is a block, cut from a segment that the driver gave. A freed block stays with the process,
merged with free neighbours of its segment. A request takes the smallest free block that is large enough and
cuts the rest off; where there is none, the driver is asked for another segment. So more is reserved than
allocated wherever free blocks are too small for what is asked next.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with default settings, one stream and more memory
than is asked for, and with expandable_segments: a pool is then one segment, to whose end pages are added.
"""

from __future__ import annotations

from bisect import bisect_left, insort

# c10/core/AllocatorConfig.h, the names as there.
MIN_BLOCK_SIZE = 512
SMALL_SIZE = 2**20
SMALL_BUFFER = 2 * 2**20
LARGE_BUFFER = 20 * 2**20
MIN_LARGE_ALLOC = 10 * 2**20
ROUND_LARGE = 2 * 2**20


class Block:
    """Bytes [address, address + size) of a segment; before, after: its neighbours in the segment."""

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    def __init__(
        self, pool: Pool, address: int, size: int, before: Block | None = None, after: Block | None = None
    ) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.before = before
        self.after = after
        self.free = False


class Pool:
    """Small requests share segments of their own. expandable: one segment that grows page by page."""

    def __init__(self, small: bool, expandable: bool) -> None:
        self.small = small
        self.expandable = expandable
        # With expandable segments no remainder is too small to be used again.
        self.least_rest = MIN_BLOCK_SIZE if small or expandable else SMALL_SIZE + 1
        self.end = 0  # where the next segment, or the next page, begins
        self.last: Block | None = None  # of the segment made last
        self._order: list[tuple[int, int]] = []  # (size, address) of the free blocks
        self._free: dict[int, Block] = {}  # by address

    def allocate(self, size: int) -> tuple[Block, int]:
        """A block of a rounded size or a little more, and the bytes that were reserved for it."""
        block, reserved = self._best_fit(size), 0
        if block is None:
            block, reserved = self._expand(size) if self.expandable else self._segment(size)
        if block.size - size >= self.least_rest:
            self._cut(block, size)
        return block, reserved

    def free(self, block: Block) -> None:
        before, after = block.before, block.after
        if before is not None and before.free:
            self._take(before)
            block = self._join(before, block)
        if after is not None and after.free:
            self._take(after)
            block = self._join(block, after)
        self._give(block)

    def _best_fit(self, size: int) -> Block | None:
        """The smallest free block, of equal ones that with the lowest address.

        The last block of an expandable segment counts as large as it can grow, so it comes last.
        """
        order = self._order
        i = bisect_left(order, (size, 0))
        if i == len(order):
            return None
        block = self._free[order[i][1]]
        if self.expandable and block is self.last and i + 1 < len(order):
            block = self._free[order[i + 1][1]]
        self._take(block)
        return block

    def _segment(self, size: int) -> tuple[Block, int]:
        if self.small:
            reserved = SMALL_BUFFER
        else:
            reserved = LARGE_BUFFER if size < MIN_LARGE_ALLOC else _rounded(size, ROUND_LARGE)
        self.last = Block(self, self.end, reserved)
        self.end += reserved + 1  # never next to another one
        return self.last, reserved

    def _expand(self, size: int) -> tuple[Block, int]:
        """The free end of the segment, with as many pages more as are missing."""
        last = self.last
        if last is not None and last.free:
            self._take(last)
            reserved = _rounded(size - last.size, self._page)
            last.size += reserved
        else:
            reserved = _rounded(size, self._page)
            self.last = Block(self, self.end, reserved, last)
            if last is not None:
                last.after = self.last
        self.end += reserved
        assert self.last is not None
        return self.last, reserved

    @property
    def _page(self) -> int:
        return SMALL_BUFFER if self.small else LARGE_BUFFER

    def _cut(self, block: Block, size: int) -> None:
        """Leave `size` bytes in the block, and the rest free behind it."""
        rest = Block(self, block.address + size, block.size - size, block, block.after)
        if rest.after is not None:
            rest.after.before = rest
        if self.last is block:
            self.last = rest
        block.after, block.size = rest, size
        self._give(rest)

    def _join(self, block: Block, after: Block) -> Block:
        block.size += after.size
        block.after = after.after
        if block.after is not None:
            block.after.before = block
        if self.last is after:
            self.last = block
        return block

    def _give(self, block: Block) -> None:
        block.free = True
        insort(self._order, (block.size, block.address))
        self._free[block.address] = block

    def _take(self, block: Block) -> None:
        block.free = False
        del self._order[bisect_left(self._order, (block.size, block.address))]
        del self._free[block.address]


class CachingAllocator:
    """Allocations and frees, and what they come to: bytes of blocks in use and of segments. What is reserved
    is kept, so that is its peak, too."""

    def __init__(self, expandable_segments: bool = False) -> None:
        self._small = Pool(small=True, expandable=expandable_segments)
        self._large = Pool(small=False, expandable=expandable_segments)
        self.allocated = 0
        self.peak_allocated = 0
        self.reserved = 0

    def allocate(self, nbytes: int) -> Block | None:
        """None for no bytes, which take no memory."""
        if nbytes == 0:
            return None
        size = _rounded(nbytes, MIN_BLOCK_SIZE)
        pool = self._small if size <= SMALL_SIZE else self._large
        block, reserved = pool.allocate(size)
        self.reserved += reserved
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block | None) -> None:
        if block is not None:
            self.allocated -= block.size
            block.pool.free(block)


def _rounded(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple
