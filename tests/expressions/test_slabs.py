"""Slabs partition an axis, and a window's input rows are the ones a convolution reads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effseg.common.device import pretending
from effseg.expressions.slabs import (
    MIN_ROWS,
    SHARE,
    SLAB_FRACTION,
    THICK_SLAB_ELEMENTS,
    Window,
    at_least,
    rows_per_slab,
    slabs,
    slabs_of_levels,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@given(
    st.integers(1, 700),
    st.integers(1, 2**24),
    st.one_of(st.none(), st.integers(-(2**26), 2**26)),
    st.sampled_from([CPU, CUDA]),
)
def test_thickness_is_a_number_of_rows(rows, row_elements, slab_elements, device):
    thickness = rows_per_slab(rows, row_elements, slab_elements, device)
    assert 1 <= thickness <= rows
    if slab_elements is not None and slab_elements > 0:
        assert thickness == 1 or thickness * row_elements <= slab_elements
    assert thickness == rows_per_slab(rows, row_elements, thickness * row_elements, device)  # equal slabs


@given(st.integers(1, 4), st.integers(1, 100), st.integers(1, 120))
def test_slabs_partition_every_sample(samples, rows, thickness):
    seen = [(n, row) for n, lo, hi, _ in slabs(samples, rows, thickness) for row in range(lo, hi)]
    assert seen == [(n, row) for n in range(samples) for row in range(rows)]


@pytest.mark.parametrize(("rows", "thickness"), [(128, MIN_ROWS), (256, 6), (512, 12), (1024, 25)])
def test_a_slab_is_the_same_share_of_any_ct(rows, thickness):
    assert rows_per_slab(rows, 16 * rows * 512, SHARE, CUDA) == thickness
    assert thickness == pytest.approx(rows * SLAB_FRACTION, rel=0.25)


def test_slabs_of_a_small_volume_are_thick():
    assert rows_per_slab(512, 16 * 512 * 512, None, CPU) == 12
    assert rows_per_slab(128, 16 * 128 * 128, None, CPU) * 16 * 128 * 128 == THICK_SLAB_ELEMENTS["cpu"]


def test_slabs_are_thicker_on_a_gpu_and_where_one_is_predicted():
    assert rows_per_slab(256, 16 * 256 * 256, None, CPU) == 6
    assert rows_per_slab(256, 16 * 256 * 256, None, CUDA) == 16
    with pretending("cuda"):
        assert rows_per_slab(256, 16 * 256 * 256, None, CPU) == 16


def test_coarse_levels_have_slabs_of_as_many_elements():
    finest, half = 16 * 512**3, 32 * 256**3
    assert slabs_of_levels(finest, finest, CPU, flat=False) is None
    assert slabs_of_levels(finest, half, CPU, flat=True) == at_least(2**20)
    assert slabs_of_levels(finest, finest, CUDA, flat=False) == at_least(finest // 32)
    stream = slabs_of_levels(finest, half, CUDA, flat=True)
    assert stream == at_least(half // 32)
    assert rows_per_slab(512, finest // 512, stream, CUDA) == 12
    assert rows_per_slab(256, half // 256, stream, CUDA) == 8
    assert rows_per_slab(128, 48 * 128**2, stream, CUDA) == 19  # seven slabs in place of 32


def test_slabs_are_of_about_equal_thickness():
    """A rest of one row would be all halo."""
    assert MIN_ROWS < 5
    assert rows_per_slab(5, 2**20, SHARE, CPU) == 3


@given(
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    rows=st.integers(1, 40),
    data=st.data(),
)
def test_input_rows_are_those_that_the_taps_read(kernel, stride, rows, data):
    window = Window((kernel,) * 3, (stride,) * 3)
    out = window.output_size((rows, 1, 1))[0]
    lo = data.draw(st.integers(0, out - 1))
    hi = data.draw(st.integers(lo + 1, out))
    taps = [stride * o + t - kernel // 2 for o in range(lo, hi) for t in range(kernel)]
    first, last, (before, after) = window.input_rows(lo, hi, rows)
    assert (first - before, last + after) == (min(taps), max(taps) + 1)
    assert first == max(min(taps), 0)
    assert last == min(max(taps) + 1, rows)


@pytest.mark.parametrize(("size", "stride", "expected"), [(7, 1, 7), (7, 2, 4), (8, 2, 4), (1, 2, 1)])
def test_output_size(size, stride, expected):
    assert Window((3, 3, 3), (stride,) * 3).output_size((size,) * 3) == (expected,) * 3
