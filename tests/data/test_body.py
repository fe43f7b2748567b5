"""The body's bounding box."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effseg.data.body import body_box, grow


def volume(*boxes: tuple[slice, slice, slice], shape: tuple[int, int, int] = (20, 22, 24)) -> np.ndarray:
    array = np.full(shape, -1000, np.int16)
    for box in boxes:
        array[box] = 40
    return array


BODY = (slice(3, 15), slice(4, 12), slice(0, 24))
TABLE = (slice(0, 20), slice(13, 15), slice(0, 24))


def test_a_table_that_does_not_touch_stays_outside() -> None:
    assert body_box(volume(BODY, TABLE), -500) == BODY


def test_a_table_that_touches_belongs_to_the_body() -> None:
    touching = (slice(0, 20), slice(12, 14), slice(0, 24))
    assert body_box(volume(BODY, touching), -500) == (slice(0, 20), slice(4, 14), slice(0, 24))


def test_lungs_are_no_hole_in_the_box() -> None:
    array = volume(BODY)
    array[5:13, 6:10, 2:20] = -800
    assert body_box(array, -500) == BODY


def test_no_body() -> None:
    assert body_box(volume(), -500) is None


def test_the_threshold_itself_is_outside() -> None:
    assert body_box(np.full((2, 2, 2), -500, np.int16), -500) is None
    assert body_box(np.full((2, 2, 2), -499.9, np.float32), -500) == (slice(0, 2),) * 3


def test_of_equal_components_the_first_box_counts_in_any_memory_order() -> None:
    first, second = (slice(1, 3), slice(8, 10), slice(1, 3)), (slice(8, 10), slice(1, 3), slice(8, 10))
    array = volume(first, second)
    assert body_box(array, -500) == first
    assert body_box(np.asfortranarray(array), -500) == first


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    axes=st.permutations(range(3)),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    density=st.floats(0.05, 0.9),
    seed=st.integers(0, 1000),
)
def test_every_memory_order_gives_the_same_answer(
    shape: tuple[int, int, int], axes: list[int], flips: tuple[int, ...], density: float, seed: int
) -> None:
    stored = np.where(np.random.default_rng(seed).random(shape) < density, 40, -1000).astype(np.int16)
    array = stored[:: flips[0], :: flips[1], :: flips[2]].transpose(axes)
    spacing = (0.8, 2.0, 5.0)
    assert body_box(array, -500, spacing) == body_box(np.ascontiguousarray(array), -500, spacing)


def test_grow_is_in_mm_and_stays_inside() -> None:
    box = slice(3, 15), slice(4, 12), slice(0, 24)
    grown = grow(box, 5.0, (1.0, 2.0, 3.0), (20, 22, 24))
    assert grown == (slice(0, 20), slice(1, 15), slice(0, 24))
    assert grow(box, 0.0, (1.0, 1.0, 1.0), (20, 22, 24)) == box


@pytest.mark.slow
def test_a_volume_of_512_cubed_takes_seconds() -> None:
    array = np.full((512, 512, 512), -1000, np.int16, order="F")
    array[40:470, 120:430, :] = 40
    array[:, 440:450, :] = 40
    start = time.process_time()
    box = body_box(array, -500)
    assert box == (slice(40, 470), slice(120, 430), slice(0, 512))
    assert time.process_time() - start < 15
