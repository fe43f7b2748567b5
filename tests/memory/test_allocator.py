"""The caching allocator's rules, by sequences worked out by hand from c10/cuda/CUDACachingAllocator.cpp."""

import random
from itertools import pairwise

import pytest

from effseg.memory.allocator import CachingAllocator
from effseg.memory.trace import LARGEST_WORKSPACE, Trace

MIB = 2**20
BOTH = pytest.mark.parametrize("expandable", [False, True], ids=["segments", "expandable"])


def allocator(expandable=False):
    made = CachingAllocator(expandable)

    def mib(size):
        return made.allocate(int(size * MIB))

    return made, mib


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        # 10 MiB and more get a segment of their own, rounded to 2 MiB; up to 1 MiB of rest is not cut off.
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
    ],
)
def test_a_first_request(nbytes, allocated, reserved):
    made = CachingAllocator()
    made.allocate(nbytes)
    assert (made.allocated, made.reserved) == (allocated, reserved)


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (20 * MIB, 20 * MIB), (21 * MIB, 40 * MIB)],
)
def test_a_first_request_with_expandable_segments(nbytes, reserved):
    """Pages of 2 MiB in the small pool, of 20 MiB in the large one; any rest is cut off."""
    made = CachingAllocator(expandable_segments=True)
    made.allocate(nbytes)
    assert (made.allocated, made.reserved) == (-(-nbytes // 512) * 512, reserved)


def test_small_requests_share_a_segment():
    made, mib = allocator()
    blocks = [mib(0.5) for _ in range(4)]
    assert made.reserved == 2 * MIB
    mib(0.5)
    assert made.reserved == 4 * MIB
    for block in blocks:
        made.free(block)
    mib(1), mib(1)
    assert made.reserved == 4 * MIB  # what was freed has become one block again


def test_the_smallest_block_that_is_large_enough_is_taken():
    made, mib = allocator()
    large, small = mib(64), mib(32)
    made.free(large), made.free(small)
    assert mib(30).address == small.address
    assert mib(40).address == large.address
    assert made.reserved == 96 * MIB


def test_of_equal_blocks_the_first_in_memory_is_taken():
    made, mib = allocator()
    first, second = mib(32), mib(32)
    made.free(second), made.free(first)
    assert mib(32).address == first.address


def test_segments_never_merge():
    """Two free segments of 32 MiB do not make one of 64, where one of 64 gives two of 32."""
    made, mib = allocator()
    for block in [mib(32), mib(32)]:
        made.free(block)
    mib(64)
    assert made.reserved == 128 * MIB
    made, mib = allocator()
    made.free(mib(64))
    mib(32), mib(32)
    assert made.reserved == 64 * MIB


def test_a_tensor_in_the_middle_of_a_free_segment_keeps_it_from_being_used():
    made, mib = allocator()
    made.free(mib(64))
    before, kept, after = mib(20), mib(8), mib(36)
    made.free(before), made.free(after)
    mib(40)
    assert made.reserved == 104 * MIB
    made.free(kept)
    mib(64)
    assert made.reserved == 104 * MIB


def test_a_rest_of_a_mebibyte_stays_with_the_block():
    made, mib = allocator()
    made.free(mib(32))
    block = mib(31)
    assert (block.size, made.allocated) == (32 * MIB, 32 * MIB)
    made.free(block)
    assert mib(30.5).size == 30.5 * MIB


def test_the_pools_are_apart():
    made, mib = allocator()
    made.free(mib(20))
    mib(0.5)
    assert made.reserved == 22 * MIB


def test_expandable_segments_grow_at_their_end():
    """40 + 40 free beside each other serve 80; 100 of which 80 are free at the end take one page more."""
    made, mib = allocator(expandable=True)
    first, second = mib(40), mib(40)
    made.free(first), made.free(second)
    mib(80)
    assert made.reserved == 80 * MIB
    made, mib = allocator(expandable=True)
    kept, free = mib(20), mib(80)
    made.free(free)
    assert mib(100).address == kept.size
    assert made.reserved == 120 * MIB


def test_the_end_of_an_expandable_segment_is_taken_last():
    """It counts as large as it can grow: the hole of 60 is taken for 20, not the 40 at the end."""
    made, mib = allocator(expandable=True)
    hole, _, end = mib(60), mib(20), mib(40)
    made.free(hole), made.free(end)
    assert mib(20).address == hole.address
    assert mib(50).address == 80 * MIB


@BOTH
def test_random_sequences_keep_the_books(expandable):
    """Blocks in use do not overlap, free neighbours are merged, and the totals are those of the blocks."""
    draw = random.Random(0)
    made, live = CachingAllocator(expandable), []
    for _ in range(3000):
        if live and draw.random() < 0.5:
            made.free(live.pop(draw.randrange(len(live))))
        else:
            live.append(made.allocate(draw.choice([300, 5000, MIB, 3 * MIB, 17 * MIB, 40 * MIB + 7])))
    assert made.allocated == sum(block.size for block in live) <= made.reserved
    for pool in {block.pool for block in live}:
        spans = sorted((b.address, b.address + b.size) for b in live if b.pool is pool)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for block in live:
        made.free(block)
    assert made.allocated == 0
    segments = {}
    for pool in {block.pool for block in live}:
        free = pool._free.values()
        assert all(block.before is None and block.after is None for block in free)
        segments[pool] = sum(block.size for block in free)
    assert sum(segments.values()) == made.reserved


# Traces


def test_a_step_is_replayed_with_what_lives_before_it():
    trace = Trace()
    trace.allocate(30 * MIB)
    trace.begin_step()
    kept = trace.allocate(100 * MIB)
    trace.free(trace.allocate(50 * MIB))
    trace.allocate(20 * MIB)  # a gradient that outlives the step
    trace.free(kept)
    assert trace.replay() == (180 * MIB, 180 * MIB)


def test_the_second_step_may_reserve_more():
    """First 20 and 40 lie in the freed 60, and 30 gets a segment; in the second step 20 takes that, and 30
    finds none."""
    trace = Trace()
    trace.begin_step()
    trace.free(trace.allocate(60 * MIB))
    tokens = [trace.allocate(size * MIB) for size in (20, 40, 30)]
    for token in tokens:
        trace.free(token)
    assert trace.replay(steps=1) == (90 * MIB, 90 * MIB)
    assert trace.replay(steps=2) == (90 * MIB, 120 * MIB)
    assert trace.replay() == trace.replay(steps=5)


def test_a_workspace_is_taken_and_given_back():
    trace = Trace()
    trace.begin_step()
    for size in (30 * MIB, 10 * LARGEST_WORKSPACE):
        trace.workspace(size)
    assert trace.replay() == (LARGEST_WORKSPACE, LARGEST_WORKSPACE + 30 * MIB)
    assert trace.largest_workspace == LARGEST_WORKSPACE
