"""Forward convolution against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import faults
import pytest
import torch
import triton
import triton.language as tl
from convolution_cases import (
    CUBE,
    FEW,
    SLIDE,
    TAP,
    assert_moments,
    convolution,
    normal,
    on,
    operand,
    poisoned,
    some_terms,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_rounded, slack

from effseg.expressions.slabs import Window
from effseg.kernels import conv3d_host
from effseg.kernels.config import INTERPRETER, Config
from effseg.kernels.conv3d_fwd import conv3d_forward
from effseg.kernels.conv3d_loops import plane_base
from effseg.kernels.launch import NormAct

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def check(
    config: Config,
    x: torch.Tensor,
    out_channels: int,
    device: torch.device,
    *,
    window: Window = CUBE,
    front: int | None = None,
    rows: int | None = None,
    terms: NormAct | None = None,
    bias: bool = False,
    statistics: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    front = window.padding[0] if front is None else front
    rows = window.output_size((x.shape[2], 1, 1))[0] if rows is None else rows
    dtype = dtype or x.dtype
    weight = normal(out_channels, x.shape[1], *window.kernel, seed=4)
    b = normal(out_channels, seed=5) if bias else None
    a, size, open_by = operand(x, terms, dtype)

    def computed(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return convolution(values, weight, bias, window, front, rows)

    rounded, wide_bias = weight.to(dtype).double(), None if b is None else b.double()
    exact = computed(a, rounded, wide_bias)
    allowed = slack(computed(size, rounded.abs(), None if b is None else wide_bias.abs()))
    out = poisoned(exact.shape, dtype, device)
    moments = conv3d_forward(
        x.to(device), weight.to(device), out, window=window, front=front, prologue=on(terms, device),
        bias=None if b is None else b.to(device), statistics=statistics, config=config,
    )  # fmt: skip
    assert_rounded(out, exact, allowed + computed(open_by, rounded.abs(), None), "convolution")
    assert (moments is not None) == statistics
    if moments is not None:
        assert_moments(*moments, out)


@pytest.mark.diagonal
@pytest.mark.parametrize(
    ("config", "channels", "shape", "dtype"),
    [
        (SLIDE, (16, 16), (1, 2, 9, 17), FP32),  # a tile without borders in the middle
        (SLIDE, (16, 33), (1, 2, 1, 7), BF16),
        (SLIDE, (32, 3), (2, 1, 3, 2), FP16),
        (SLIDE, (17, 2), (1, 1, 9, 17), FP32),
        (TAP, (5, 1), (1, 1, 9, 7), FP32),
        (TAP, (33, 17), (1, 1, 2, 11), BF16),
        (replace(TAP, block_n=16, block_k=16), (48, 17), (1, 1, 5, 5), FP16),
        (FEW, (1, 16), (3, 3, 7, 11), BF16),
        (FEW, (3, 5), (1, 2, 5, 1), FP32),
    ],
)
@pytest.mark.parametrize("prologue", [True, False])
def test_loops(config, channels, shape, dtype, prologue, kernel_device):
    samples, *size = shape
    x = normal(samples, channels[0], *size, offset=0.5).to(dtype)
    terms = some_terms(samples, channels[0]) if prologue else None
    check(config, x, channels[1], kernel_device, terms=terms)


@pytest.mark.parametrize("config", [TAP, FEW])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((1, 1, 1), (1, 1, 1)), ((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((3, 1, 5), (2, 2, 1))],
)
def test_windows(config, kernel, stride, kernel_device):
    x = normal(1, 3, 3, 6, 7)
    check(config, x, 4, kernel_device, window=Window(kernel, stride), terms=some_terms(1, 3), bias=True)


@pytest.mark.parametrize("config", [SLIDE, TAP, FEW])
@pytest.mark.parametrize(("front", "rows"), [(0, 2), (-1, 1), (3, 4)])
def test_rows_outside_the_input_are_zero(config, front, rows, kernel_device):
    x = normal(1, 16 if config is SLIDE else 3, 2, 3, 5)
    check(config, x, 5, kernel_device, front=front, rows=rows, terms=some_terms(1, x.shape[1]))


@pytest.mark.parametrize("config", [SLIDE, FEW])
@pytest.mark.parametrize("slope", [0.0, 1.0, 1.5])
def test_slopes(config, slope, kernel_device):
    x = normal(1, 16 if config is SLIDE else 2, 1, 3, 4)
    check(config, x, 2, kernel_device, terms=some_terms(1, x.shape[1], slope), statistics=False)


FAULTS = {
    "tap": lambda f: faults.before(f, 1, faults.tap),
    "weight": lambda f: faults.before(f, 1, faults.weight),
    "input": lambda f: faults.before(f, 0, faults.border),
    "border": lambda f: faults.after(f, 2, faults.border),
    "row": lambda f: faults.before(f, 0, faults.row),
    "mean": lambda f: faults.result(f, faults.one, 0),
    "variance": lambda f: faults.result(f, faults.one, 1),
}


@pytest.mark.parametrize(
    ("fault", "config", "dtype"),
    [*((fault, SLIDE, FP32) for fault in FAULTS), ("tap", TAP, FP32), ("border", FEW, BF16)],
)
def test_a_fault_is_seen(fault, config, dtype, kernel_device, monkeypatch):
    monkeypatch.setitem(globals(), "conv3d_forward", FAULTS[fault](conv3d_forward))
    x = normal(1, 5 if config is FEW else 48, 2, 3, 9, offset=0.5).to(dtype)
    with pytest.raises(AssertionError, match="elements wrong"):
        check(config, x, 16, kernel_device, terms=some_terms(1, x.shape[1]))


def test_an_image_of_integers(kernel_device):
    image = (normal(1, 1, 3, 5, 6) * 500).to(torch.int16)
    check(FEW, image, 16, kernel_device, dtype=BF16)
    check(FEW, image, 16, kernel_device, dtype=FP32, window=Window((3, 3, 3), (2, 2, 2)))


@pytest.mark.parametrize("config", [SLIDE, FEW])
@pytest.mark.parametrize("wide", [False, True])
def test_statistics_do_not_cancel(config, wide, kernel_device):
    """A mean ten thousand times the deviation, with sums per place and, in a wide tile, per channel."""
    ci = 16 if config is SLIDE else 1
    x, weight, bias = normal(1, ci, 3, 5, 9), normal(16, ci, 3, 3, 3), torch.full((16,), 1e4)
    config = replace(config, block_h=8, block_w=64 if wide else 16, block_d=3)
    assert conv3d_host.sums_per_place(config, ci, INTERPRETER) is not wide
    out = poisoned((1, 16, 3, 5, 9), FP32, kernel_device)
    mean, variance = conv3d_forward(
        x.to(kernel_device), weight.to(kernel_device), out, window=CUBE, front=1, statistics=True,
        bias=bias.to(kernel_device), config=config,
    )  # fmt: skip
    assert_moments(mean, variance, out)


@pytest.mark.parametrize("config", [SLIDE, TAP])
def test_rows_of_a_larger_tensor(config, kernel_device):
    """Input and output are views of rows of channels-last tensors, of several samples."""
    whole, into = normal(2, 16, 5, 3, 4), poisoned((2, 16, 5, 3, 4), FP32, kernel_device)
    x = whole.to(kernel_device).contiguous(memory_format=torch.channels_last_3d)[:, :, 1:3]
    weight = normal(16, 16, 3, 3, 3)
    conv3d_forward(x, weight.to(kernel_device), into[:, :, 2:4], window=CUBE, front=1, config=config)
    exact, size = (
        convolution(sign(whole[:, :, 1:3].double()), sign(weight.double()), None, CUBE, 1, 2)
        for sign in (torch.positive, torch.abs)
    )
    assert_rounded(into[:, :, 2:4], exact, slack(size))
    assert into[:, :, :2].isnan().all()
    assert into[:, :, 4:].isnan().all()


def test_an_output_that_is_not_channels_last(kernel_device):
    x, weight = normal(1, 3, 1, 4, 5).to(kernel_device), normal(4, 3, 3, 3, 3).to(kernel_device)
    out = torch.full((1, 4, 1, 4, 5), torch.nan, device=kernel_device)
    conv3d_forward(x, weight, out, window=CUBE, front=1, config=TAP)
    exact, size = (
        convolution(sign(x.cpu().double()), sign(weight.cpu().double()), None, CUBE, 1, 1)
        for sign in (torch.positive, torch.abs)
    )
    assert_rounded(out, exact, slack(size))


@pytest.mark.parametrize("config", [SLIDE, TAP])
def test_the_same_bits_again_and_nothing_unwritten(config, kernel_device, monkeypatch):
    empty = torch.empty
    x, weight = normal(1, 16, 2, 3, 9).to(kernel_device), normal(16, 16, 3, 3, 3).to(kernel_device)

    def run() -> list[torch.Tensor]:
        out = poisoned(x.shape, BF16, kernel_device)
        moments = conv3d_forward(
            x.to(BF16), weight, out, window=CUBE, front=1, statistics=True, config=config
        )
        return [out, *moments]

    first = run()
    monkeypatch.setattr(conv3d_host.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_what_does_not_fit_is_named(kernel_device):
    x = normal(1, 3, 2, 2, 2).to(kernel_device)
    weight, out = normal(4, 3, 3, 3, 3).to(kernel_device), normal(1, 4, 2, 2, 2).to(kernel_device)
    with pytest.raises(TypeError, match="float64"):
        conv3d_forward(x.double(), weight, out, window=CUBE, front=1, config=TAP)
    with pytest.raises(ValueError, match="slide"):
        conv3d_forward(x, weight[:, :, :1], out, window=Window((1, 3, 3)), front=0, config=SLIDE)
    with pytest.raises(ValueError, match="spiral"):
        conv3d_forward(x, weight, out, window=CUBE, front=1, config=Config("spiral", 2, 4, 4, 16, 16))


@triton.jit
def _address_kernel(found_ptr, n, d, stride, H, W, C: tl.constexpr):
    tl.store(found_ptr, plane_base(tl.zeros((), tl.int64), n, d, stride, H * W, C))


@pytest.mark.parametrize(("n", "d"), [(0, 511), (1, 511), (3, 0), (2, -1)])
def test_addresses_past_2_31_elements(n, d, kernel_device):
    """Planes of 512 x 512 x 512 x 32 tensors, by the function that the kernels use."""
    found = torch.zeros(1, dtype=torch.int64, device=kernel_device)
    _address_kernel[(1,)](found, n, d, 512 * 512 * 512, 512, 512, 32)
    assert found.item() == (n * 512 + d) * 512 * 512 * 32


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_geometry(data, kernel_device):
    loop = data.draw(st.sampled_from([SLIDE, TAP, FEW]))
    odd = st.sampled_from([1, 3])
    strides = st.sampled_from([1, 2])
    window = CUBE
    if loop is not SLIDE:
        window = Window(data.draw(st.tuples(odd, odd, odd)), data.draw(st.tuples(strides, strides, strides)))
    channels = {"slide": [16], "tap": [1, 3, 17], "few": [1, 2]}[loop.loop]
    ci = data.draw(st.sampled_from(channels))
    size = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 10)))
    samples = data.draw(st.integers(1, 2))
    dtype = data.draw(st.sampled_from([FP32, BF16, FP16]))
    terms = some_terms(samples, ci, data.draw(st.sampled_from([0.0, 0.01, 1.0, 2.0])))
    check(
        loop,
        normal(samples, ci, *size).to(dtype),
        data.draw(st.sampled_from([1, 5, 16, 18])),
        kernel_device,
        window=window,
        front=data.draw(st.integers(-2, 4)),
        rows=data.draw(st.integers(1, 5)),
        terms=terms if data.draw(st.booleans()) else None,
        bias=data.draw(st.booleans()),
    )
