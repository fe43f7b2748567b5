"""Per-channel moments of stored values."""

import faults
import pytest
import torch
from convolution_cases import assert_moments
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from effseg.kernels.config import Config
from effseg.kernels.launch import empty
from effseg.kernels.statistics import moments

NAN = float("nan")
CONFIG = Config("tile", block_w=32, block_n=16, splits=6)


def values(shape, dtype, device, seed=0, offset=0.0):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset
    return t.to(device, dtype).contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [
        (torch.float32, (1, 1, 1, 1, 1), 0.0),
        (torch.float32, (3, 5, 2, 7, 9), 2.0),
        (torch.float32, (1, 33, 1, 9, 7), 1000.0),
        (torch.bfloat16, (1, 16, 3, 7, 11), 30.0),
        (torch.bfloat16, (2, 48, 3, 1, 7), 0.0),
        (torch.float16, (2, 17, 2, 2, 9), 100.0),
    ],
)
def test_against_float64(dtype, shape, offset, kernel_device):
    y = values(shape, dtype, kernel_device, offset=offset)
    mean, variance = moments(y, CONFIG)
    assert mean.dtype == variance.dtype == torch.float32
    assert_moments(mean, variance, y)


def test_more_parts_than_a_tile_of_them(kernel_device):
    """193 programs, whose moments are merged in tiles of 128; the last has one voxel."""
    y = values((1, 9, 5, 7, 11), torch.float32, kernel_device, offset=100.0)
    mean, variance = moments(y, Config("tile", block_w=2, block_n=16, splits=300))
    assert_moments(mean, variance, y)


def test_a_fault_is_seen(kernel_device):
    """One voxel of one channel in the sums is a thousandth too large, or one result is."""
    y = values((1, 3, 3, 5, 7), torch.float32, kernel_device)
    wrong = y.clone()
    faults.border(wrong)
    mean, variance = moments(y, CONFIG)
    for call in (
        lambda: assert_moments(*moments(wrong, CONFIG), y),
        lambda: assert_moments(mean, variance * faults.BY, y),
    ):
        with pytest.raises(AssertionError, match="elements wrong"):
            call()


def test_equal_values_have_no_variance(kernel_device):
    y = torch.full((1, 3, 5, 7, 9), 1e4 / 3, device=kernel_device)
    mean, variance = moments(y, CONFIG)
    assert_moments(mean, variance, y)


def test_any_layout_and_slabs(kernel_device):
    whole = values((2, 5, 5, 3, 7), torch.float32, kernel_device)
    slab = whole[:, :, 1:4]
    got, expected = moments(slab, CONFIG), moments(slab.contiguous(), CONFIG)
    assert torch.equal(torch.stack(got), torch.stack(expected))


def test_same_bits_and_no_unwritten_partials(kernel_device, monkeypatch):
    y = values((2, 33, 2, 5, 7), torch.bfloat16, kernel_device)
    first = moments(y, CONFIG)
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: allocate(*args, **options).fill_(NAN))
    second = moments(y, CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_chosen_configuration(kernel_device):
    y = values((1, 3, 2, 3, 5), torch.float32, kernel_device)
    assert_moments(*moments(y), y)


def test_fake_tensors():
    with FakeTensorMode():
        y = empty((2, 5, 3, 4, 6), torch.bfloat16, torch.device("cpu"))
        mean, variance = moments(y, CONFIG)
    assert mean.shape == variance.shape == (2, 5)


def test_what_is_refused(kernel_device):
    with pytest.raises(TypeError, match=r"y: expected float32.*int32"):
        moments(torch.zeros(1, 1, 1, 1, 1, dtype=torch.int32, device=kernel_device))
    with pytest.raises(ValueError, match="at least one voxel"):
        moments(torch.zeros(1, 1, 0, 1, 1, device=kernel_device), CONFIG)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(kernel_device):
    y = empty((1, 32, 65, 1024, 1025), torch.bfloat16, kernel_device).fill_(1)
    y[:, :, -1] = 66
    mean, variance = moments(y)
    torch.testing.assert_close(mean, torch.full_like(mean, 2.0))
    torch.testing.assert_close(variance, torch.full_like(variance, 64.0))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    shape=st.tuples(*(st.integers(1, high) for high in (3, 40, 3, 9, 9))),
    offset=st.sampled_from((0.0, -3.0, 50.0)),
    config=st.builds(
        Config,
        st.just("tile"),
        block_w=st.sampled_from((8, 32, 128)),
        block_n=st.sampled_from((16, 32, 64)),
        splits=st.integers(1, 12),
    ),
    seed=st.integers(0, 99),
)
def test_any_shape(dtype, shape, offset, config, seed, kernel_device):
    y = values(shape, dtype, kernel_device, seed, offset)
    assert_moments(*moments(y, config), y)
