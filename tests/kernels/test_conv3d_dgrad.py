"""The gradient of a convolution's input against autograd in float64, in the interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import faults
import pytest
import torch
from convolution_cases import (
    CUBE,
    SLIDE,
    TAP,
    convolution,
    norm,
    norm_size,
    normal,
    on,
    poisoned,
    some_terms,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_rounded, slack, slack_of_sum

from effseg.expressions.slabs import Window
from effseg.kernels import conv3d_host
from effseg.kernels.config import INTERPRETER, Config
from effseg.kernels.conv3d_dgrad import conv3d_dgrad
from effseg.kernels.launch import NormAct

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def check(
    config: Config,
    channels: tuple[int, int],
    shape: tuple[int, ...],
    device: torch.device,
    *,
    window: Window = CUBE,
    front: int | None = None,
    rows: int | None = None,
    terms: NormAct | None = None,
    dtype: torch.dtype = FP32,
) -> None:
    """channels: of the output, of the input; shape (N, D, H, W) of the input; rows: of the output."""
    (co, ci), (n, *size) = channels, shape
    front = window.padding[0] if front is None else front
    rows = window.output_size((size[0], 1, 1))[0] if rows is None else rows
    weight = normal(co, ci, *window.kernel, seed=4)
    rounded = weight.to(dtype).double()
    y = normal(n, ci, *size).to(dtype)

    def computed(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The transposed convolution, as torch derives it."""
        zeros = torch.zeros(y.shape, dtype=torch.float64, requires_grad=True)
        out = convolution(zeros, weight, None, window, front, rows)
        return torch.autograd.grad(out, zeros, grad)[0]

    plane = window.output_size((1, *size[1:]))[1:]
    grad = normal(n, co, rows, *plane, seed=6).to(dtype)
    got = poisoned((n, ci, *size), dtype, device)
    epilogue = None if terms is None else (y.to(device), on(terms, device))
    sums = conv3d_dgrad(
        grad.to(device), weight.to(device), got, window=window, front=front, epilogue=epilogue, config=config
    )
    exact = computed(grad.double(), rounded)
    allowed = slack(computed(grad.double().abs(), rounded.abs()))
    assert (sums is None) == (terms is None)
    if sums is None:
        assert_rounded(got, exact, allowed, "gradient")
        return
    # Through the normalisation and activation of y, whose sign is open near 0.
    z, near = norm(y.double(), terms), slack(norm_size(y.double(), terms))
    scale = terms.scale.double()[..., None, None, None]
    dz = torch.where(z > 0, exact, exact * terms.slope)
    allowed = (
        allowed * max(1.0, terms.slope) + torch.where(z.abs() <= near, (1 - terms.slope) * exact, 0).abs()
    )
    assert_rounded(got, dz * scale, allowed * scale.abs(), "gradient")
    centred = y.double() - terms.mean.double()[..., None, None, None]
    for name, mine, parts, slacks in zip(
        ("scale", "beta"), sums, (dz * centred, dz), (allowed * centred.abs(), allowed), strict=True
    ):
        assert_rounded(mine, parts.sum((2, 3, 4)), slack_of_sum(parts, slacks, (2, 3, 4)), name)


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
    ],
)
@pytest.mark.parametrize("epilogue", [True, False])
def test_loops(config, channels, shape, dtype, epilogue, kernel_device):
    terms = some_terms(shape[0], channels[1]) if epilogue else None
    check(config, channels, shape, kernel_device, terms=terms, dtype=dtype)


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((1, 1, 1), (2, 2, 2)),  # classes that no tap reaches
        ((1, 3, 3), (1, 2, 2)),
        ((3, 3, 3), (2, 2, 1)),
        ((3, 1, 5), (2, 3, 1)),
    ],
)
@pytest.mark.parametrize("epilogue", [True, False])
def test_windows(kernel, stride, epilogue, kernel_device):
    terms = some_terms(1, 5) if epilogue else None
    check(TAP, (3, 5), (1, 3, 5, 7), kernel_device, window=Window(kernel, stride), terms=terms)


@pytest.mark.diagonal
@pytest.mark.parametrize(
    ("config", "stride"), [(SLIDE, (1, 1, 1)), (TAP, (1, 1, 1)), (TAP, (2, 1, 1)), (TAP, (2, 2, 2))]
)
@pytest.mark.parametrize(("front", "rows"), [(0, 1), (-1, 1), (2, 3), (3, 2)])
def test_rows_outside_the_gradient_are_zero(config, stride, front, rows, kernel_device):
    window = Window((3, 3, 3), stride)
    terms = some_terms(1, 5)
    check(config, (16, 5), (1, 3, 2, 3), kernel_device, window=window, front=front, rows=rows, terms=terms)


@pytest.mark.parametrize("slope", [0.0, 1.0, 1.5])
def test_slopes(slope, kernel_device):
    check(SLIDE, (16, 2), (1, 1, 3, 4), kernel_device, terms=some_terms(1, 2, slope))


FAULTS = {
    "tap": lambda f: faults.before(f, 1, faults.tap),
    "weight": lambda f: faults.before(f, 1, faults.weight),
    "input": lambda f: faults.before(f, 0, faults.border),
    "border": lambda f: faults.after(f, 2, faults.border),
    "row": lambda f: faults.before(f, 0, faults.row),
    "scale": lambda f: faults.result(f, faults.one, 0),
    "beta": lambda f: faults.result(f, faults.one, 1),
}


@pytest.mark.parametrize(
    ("fault", "config", "dtype"),
    [*((fault, SLIDE, FP32) for fault in FAULTS), ("tap", TAP, FP32), ("border", TAP, BF16)],
)
def test_a_fault_is_seen(fault, config, dtype, kernel_device, monkeypatch):
    monkeypatch.setitem(globals(), "conv3d_dgrad", FAULTS[fault](conv3d_dgrad))
    with pytest.raises(AssertionError, match="elements wrong"):
        check(config, (48, 16), (1, 2, 3, 9), kernel_device, terms=some_terms(1, 16), dtype=dtype)


@pytest.mark.parametrize("config", [replace(SLIDE, block_h=8, block_w=64), replace(TAP, block_w=64)])
def test_sums_per_channel(config, kernel_device):
    """In a tile too wide for sums per place."""
    assert not conv3d_host.sums_per_place(config, 16, INTERPRETER)
    check(config, (16, 5), (2, 3, 2, 3), kernel_device, terms=some_terms(2, 5))


def test_rows_of_larger_tensors(kernel_device):
    """grad, y and out are views of rows of channels-last tensors, of several samples."""

    def rows(seed: int) -> torch.Tensor:
        whole = normal(2, 16, 4, 3, 4, seed=seed).to(kernel_device)
        return whole.contiguous(memory_format=torch.channels_last_3d)[:, :, 1:3]

    grad, y, terms = rows(0), rows(1), some_terms(2, 16)
    into, plain = (poisoned((2, 16, 4, 3, 4), FP32, kernel_device) for _ in range(2))
    weight = normal(16, 16, 3, 3, 3).to(kernel_device)
    kwargs = dict(window=CUBE, front=1, config=SLIDE)
    views = conv3d_dgrad(grad, weight, into[:, :, 1:3], epilogue=(y, on(terms, kernel_device)), **kwargs)
    target = plain[:, :, :2].clone()
    copies = conv3d_dgrad(
        grad.contiguous(), weight, target, epilogue=(y.contiguous(), on(terms, kernel_device)), **kwargs
    )
    assert torch.equal(into[:, :, 1:3], target)
    assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))
    assert into[:, :, 0].isnan().all()
    assert into[:, :, 3].isnan().all()


@pytest.mark.parametrize("config", [SLIDE, TAP])
def test_the_same_bits_again_and_nothing_unwritten(config, kernel_device, monkeypatch):
    empty = torch.empty
    grad, weight = normal(1, 16, 2, 3, 9).to(kernel_device), normal(16, 16, 3, 3, 3).to(kernel_device)
    epilogue = (normal(1, 16, 2, 3, 9).to(kernel_device, BF16), on(some_terms(1, 16), kernel_device))

    def run() -> list[torch.Tensor]:
        out = poisoned(grad.shape, BF16, kernel_device)
        sums = conv3d_dgrad(
            grad.to(BF16), weight, out, window=CUBE, front=1, epilogue=epilogue, config=config
        )
        return [out, *sums]

    first = run()
    monkeypatch.setattr(conv3d_host.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_what_does_not_fit_is_named(kernel_device):
    grad, out = normal(1, 16, 2, 2, 2).to(kernel_device), normal(1, 3, 2, 2, 2).to(kernel_device)
    weight = normal(16, 3, 3, 3, 3).to(kernel_device)
    with pytest.raises(TypeError, match="float64"):
        conv3d_dgrad(grad.double(), weight, out, window=CUBE, front=1, config=TAP)
    few = replace(TAP, loop="few")
    with pytest.raises(ValueError, match="few"):
        conv3d_dgrad(grad, weight, out, window=CUBE, front=1, epilogue=(out, some_terms(1, 3)), config=few)
    with pytest.raises(ValueError, match="slide"):
        conv3d_dgrad(grad[:, :, :1], weight, out, window=Window((3, 3, 3), (2, 1, 1)), front=1, config=SLIDE)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_geometry(data, kernel_device):
    config = data.draw(st.sampled_from([SLIDE, TAP]))
    odd = st.sampled_from([1, 3])
    strides = st.sampled_from([1, 2])
    window = CUBE
    if config is TAP:
        window = Window(data.draw(st.tuples(odd, odd, odd)), data.draw(st.tuples(strides, strides, strides)))
    samples, ci = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 5, 16, 18]))
    terms = some_terms(samples, ci, data.draw(st.sampled_from([0.0, 0.01, 1.0, 2.0])))
    check(
        config,
        (16 if config is SLIDE else data.draw(st.sampled_from([1, 3, 17])), ci),
        (samples, *data.draw(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 10)))),
        kernel_device,
        window=window,
        front=data.draw(st.integers(-2, 4)),
        rows=data.draw(st.integers(1, 4)),
        terms=terms if data.draw(st.booleans()) else None,
        dtype=data.draw(st.sampled_from([FP32, BF16, FP16])),
    )
