"""The weight gradient's kernels against float64 torch."""

from typing import NamedTuple

import faults
import pytest
import torch
import torch.nn.functional as F
from convolution_cases import norm, norm_size, on, operand
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_rounded, slack, stored
from torch import Tensor

from effseg.common.formats import CHANNELS_LAST
from effseg.expressions.slabs import Window
from effseg.kernels import conv3d_wgrad as family
from effseg.kernels.config import Config
from effseg.kernels.conv3d_wgrad import Fold, conv3d_wgrad, marches
from effseg.kernels.launch import NormAct

CUBE = Window((3, 3, 3))


class Case(NamedTuple):
    x: Tensor
    grad: Tensor
    window: Window
    front: int
    prologue: NormAct | None
    fold: Fold | None


def make(channels: tuple[int, int], size: tuple[int, int, int], window: Window, device: torch.device, *,
         samples: int = 1, rows: int | None = None, front: int | None = None,
         dtype: torch.dtype = torch.float32, slope: float | None = 0.1, folded: bool = True,
         seed: int = 0) -> Case:  # fmt: skip
    """x of `size`; grad of as many rows as x gives, unless `rows` says; no prologue if slope is None."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    ci, co = channels
    output = window.output_size(size)
    shape = (samples, co, output[0] if rows is None else rows, *output[1:])
    x, grad, y = random(samples, ci, *size).to(dtype), random(*shape).to(dtype), random(*shape).to(dtype)
    prologue = None if slope is None else NormAct(*(random(samples, ci) for _ in range(3)), slope)
    out = torch.full(shape, torch.nan, dtype=dtype, device=device).contiguous(memory_format=CHANNELS_LAST)
    fold = Fold(y, *(random(samples, co) for _ in range(3)), out) if folded else None
    return Case(x, grad, window, window.padding[0] if front is None else front, prologue, fold)


def contracted(case: Case, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a weight that x was convolved with, by torch in float64."""
    kd, kh, kw = case.window.kernel
    needed = case.window.stride[0] * (grad.shape[2] - 1) + kd
    # Rows -front, 1 - front, ... of x, zeros where it has none.
    rows = [r - case.front for r in range(needed)]
    zeros = torch.zeros_like(x[:, :, 0])
    x = torch.stack([x[:, :, r] if 0 <= r < x.shape[2] else zeros for r in rows], 2)
    weight = torch.zeros(grad.shape[1], x.shape[1], kd, kh, kw, dtype=x.dtype, requires_grad=True)
    y = F.conv3d(x, weight, stride=case.window.stride, padding=(0, kh // 2, kw // 2))
    return torch.autograd.grad(y, weight, grad)[0]


def check(case: Case, config: Config) -> Tensor:
    got = conv3d_wgrad(**case._asdict(), config=config)
    assert got.dtype == torch.float32
    dtype = case.grad.dtype
    prologue = None if case.prologue is None else on(case.prologue, torch.device("cpu"))
    a, a_size, a_open = operand(case.x, prologue, dtype)
    grad = case.grad.cpu().double()
    grad_size, grad_open = grad.abs(), torch.zeros_like(grad)
    if case.fold is not None:
        y = case.fold.y.cpu().double()
        mean, scale, shift = (t.cpu() for t in case.fold[1:4])
        terms = NormAct(mean, scale, shift, 1.0)
        grad, grad_size = grad + norm(y, terms), grad_size + norm_size(y, terms)
        assert_rounded(case.fold.out, grad, slack(grad_size), "folded gradient")
        grad, grad_open = stored(grad, slack(grad_size), dtype)
    allowed = slack(contracted(case, a_size, grad_size))
    allowed += contracted(case, a_open, grad.abs()) + contracted(case, a.abs(), grad_open)
    assert_rounded(got, contracted(case, a, grad), allowed, "grad_weight")
    return got


def marching(loop: str, **changes: int) -> Config:
    return Config(loop, **({"block_h": 2, "block_w": 8 if loop == "kw" else 4, "splits": 2} | changes))


TAPS = Config("tap", block_h=4, block_w=8, block_n=16, block_k=64, splits=2)


@pytest.mark.parametrize(("loop", "channels"), [("pair3", (16, 16)), ("pair", (16, 32)), ("kw", (16, 5))])
def test_tiles_inside_and_on_the_border(loop, channels, kernel_device):
    """Three tiles along H and W, the middle one unmasked; odd sizes; two marches along D."""
    check(make(channels, (1, 5, 17), CUBE, kernel_device), marching(loop, block_d=2))


FAULTS = {
    "tap": lambda f: faults.result(f, faults.tap),
    "weight": lambda f: faults.result(f, faults.weight),
    "input": lambda f: faults.before(f, "x", faults.border),
    "row": lambda f: faults.before(f, "x", faults.row),
}


@pytest.mark.parametrize(
    ("fault", "loop"), [*((fault, "pair3") for fault in FAULTS), ("input", "kw"), ("input", "tap")]
)
def test_a_fault_is_seen(fault, loop, kernel_device, monkeypatch):
    monkeypatch.setitem(globals(), "conv3d_wgrad", FAULTS[fault](conv3d_wgrad))
    case = make((16, 16), (2, 3, 9), CUBE, kernel_device)
    with pytest.raises(AssertionError, match="elements wrong"):
        check(case, TAPS if loop == "tap" else marching(loop))


@pytest.mark.diagonal
@pytest.mark.parametrize("loop", ["pair3", "pair", "kw"])
@pytest.mark.parametrize(("rows", "front"), [(2, 0), (1, 2), (3, -1), (1, 5)])
def test_rows_of_a_slab(loop, rows, front, kernel_device):
    """Input rows before, behind and apart from the gradient's."""
    case = make((16, 16), (2, 2, 3), CUBE, kernel_device, rows=rows, front=front, slope=0.0)
    check(case, marching(loop, splits=1))


@pytest.mark.diagonal
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("loop", "channels"), [("pair3", (16, 32)), ("pair", (32, 16)), ("kw", (48, 33)), ("tap", (5, 33))]
)
def test_types_without_and_with_pipelining(loop, channels, dtype, kernel_device):
    """Plain operands, which the gradient's rows are then read three times for, of two samples."""
    config = TAPS if loop == "tap" else marching(loop, num_stages=2, block_w=8)
    check(
        make(channels, (1, 2, 5), CUBE, kernel_device, samples=2, dtype=dtype, slope=None, folded=False),
        config,
    )
    check(make(channels, (1, 2, 3), CUBE, kernel_device, dtype=dtype, slope=1.5), config)


WINDOWS = [
    Window((3, 3, 3), (2, 2, 2)),
    Window((3, 3, 3), (2, 2, 1)),
    Window((1, 1, 1)),
    Window((1, 3, 3), (1, 2, 2)),
    Window((5, 1, 3)),
]


@pytest.mark.diagonal
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("channels", [(3, 17), (16, 5)])
def test_any_window(window, channels, kernel_device):
    check(make(channels, (3, 5, 9), window, kernel_device, samples=2), TAPS)
    check(make(channels, (2, 2, 7), window, kernel_device, rows=2, front=-1, slope=None, folded=False), TAPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_stem_reads_an_image_of_another_type(channels, dtype, kernel_device):
    case = make((channels, 16), (3, 5, 7), CUBE, kernel_device, dtype=dtype, slope=None)
    image = (case.x * 100).to(torch.int16)
    check(case._replace(x=image), TAPS)


@pytest.mark.parametrize("loop", ["pair3", "tap"])
def test_strided_operands(loop, kernel_device):
    """Channels first; rows of a larger channels-last tensor, with several samples."""
    case = make((16, 16), (2, 2, 5), CUBE, kernel_device, samples=2)
    config = TAPS if loop == "tap" else marching(loop)
    expected = conv3d_wgrad(**case._asdict(), config=config)
    whole = torch.randn(2, 16, 5, 2, 5, device=kernel_device).contiguous(memory_format=CHANNELS_LAST)
    whole[:, :, 1:3] = case.x
    wide = torch.full((2, 16, 4, 2, 5), torch.nan, device=kernel_device).contiguous(
        memory_format=CHANNELS_LAST
    )
    assert case.fold is not None
    fold = case.fold._replace(out=wide[:, :, 1:3])
    got = conv3d_wgrad(**case._replace(x=whole[:, :, 1:3], fold=fold)._asdict(), config=config)
    assert torch.equal(got, expected)
    assert torch.equal(fold.out, case.fold.out)
    assert wide[:, :, ::3].isnan().all()


@pytest.mark.parametrize("loop", ["pair3", "pair", "kw", "tap"])
def test_fresh_memory_is_written_whole_and_two_runs_agree(loop, kernel_device, monkeypatch):
    """With more splits than tiles."""
    case = make((16, 16), (1, 3, 7), CUBE, kernel_device)
    config = Config(loop, block_h=2, block_w=4, block_n=16, block_k=64, splits=9)
    first = conv3d_wgrad(**case._asdict(), config=config)

    class Poisoned:
        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        def empty(self, *shape: int, **options: object) -> Tensor:
            return torch.full(shape, torch.nan, **options)

    monkeypatch.setattr(family, "torch", Poisoned())
    assert torch.equal(conv3d_wgrad(**case._asdict(), config=config), first)


def test_splits_without_work_add_zeros(kernel_device):
    """Five tiles in shares of two leave the fourth split none."""
    case = make((3, 5), (5, 2, 3), Window((1, 1, 1)), kernel_device)
    check(case, Config("tap", block_h=4, block_w=8, block_n=16, block_k=16, splits=4))


def test_the_chosen_configuration_runs(kernel_device):
    check(make((16, 16), (2, 3, 5), CUBE, kernel_device), None)


def test_what_is_refused(kernel_device):
    case = make((16, 16), (2, 3, 5), CUBE, kernel_device)
    arguments = case._asdict()
    with pytest.raises(TypeError, match=r"grad: .*float64"):
        conv3d_wgrad(**arguments | {"grad": case.grad.double()}, config=TAPS)
    with pytest.raises(ValueError, match="grad: "):
        conv3d_wgrad(**arguments | {"grad": case.grad[..., :-1]}, config=TAPS)
    with pytest.raises(ValueError, match="config: 'pair3' cannot"):
        conv3d_wgrad(**arguments | {"window": Window((1, 3, 3))}, config=marching("pair3"))
    assert case.fold is not None
    fold = case.fold._replace(out=case.fold.out.contiguous())
    with pytest.raises(ValueError, match="fold: out"):
        conv3d_wgrad(**arguments | {"fold": fold}, config=TAPS)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_shape(data, kernel_device):
    draw = data.draw
    kernel = tuple(draw(st.sampled_from([1, 3, 3])) for _ in range(3))
    stride = tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(3))
    channels = tuple(draw(st.sampled_from([1, 3, 16, 16, 17, 32, 48])) for _ in range(2))
    window = draw(st.sampled_from([CUBE, Window(kernel, stride)]))
    loop = draw(
        st.sampled_from([p for p in ("pair3", "pair", "kw") if marches(p, window, *channels)] + ["tap"])
    )
    config = Config(
        loop,
        block_d=draw(st.sampled_from([0, 1, 2])),
        block_h=draw(st.sampled_from([2, 4])),
        block_w=8,
        block_n=draw(st.sampled_from([16, 32])),
        block_k=draw(st.sampled_from([16, 64])),
        splits=draw(st.integers(1, 4)),
        num_stages=draw(st.sampled_from([1, 2])),
    )
    case = make(
        channels,
        tuple(draw(st.integers(1, size)) for size in (3, 5, 11)),
        window,
        kernel_device,
        samples=draw(st.integers(1, 2)),
        rows=draw(st.integers(1, 3)),
        front=draw(st.integers(-2, 4)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        slope=draw(st.sampled_from([None, 0.0, 0.01, 1.0, 1.5])),
        folded=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
    check(case, config)
