"""What `effseg.tuning.autotune` runs: a problem on random numbers, by our kernels and by ATen.

The operators of the ATen algorithm are the reference of every kernel and, of convolutions, a contender.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effseg.algorithms.aten import ops as aten
from effseg.algorithms.aten.head import Head
from effseg.algorithms.interface import Sums
from effseg.common.formats import DTYPES, label_dtype
from effseg.expressions.slabs import Window
from effseg.kernels import statistics
from effseg.kernels.choose import uses_aten
from effseg.kernels.config import Config, Problem, Triple
from effseg.kernels.conv3d_dgrad import conv3d_dgrad
from effseg.kernels.conv3d_fwd import conv3d_forward
from effseg.kernels.conv3d_wgrad import conv3d_wgrad
from effseg.kernels.head import HeadGradients, head_argmax, head_backward, head_sums
from effseg.kernels.launch import NormAct, empty
from effseg.kernels.norm_act import fold, norm_act, norm_act_backward
from effseg.kernels.upsample import upsample_x2, upsample_x2_transpose

MOST_ELEMENTS = 2**27
"""Of a tensor: several times a GPU's cache, from where on time grows with the voxels."""
SLOPE = 0.01
TWICE = (2, 2, 2)
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Trial:
    """The same results from both, in the same order; features are (1, C, D, H, W)."""

    aten: Callable[[], Results]
    kernel: Callable[[Config], Results]

    def __call__(self, config: Config) -> Results:
        return self.aten() if uses_aten(config) else self.kernel(config)


def trial(
    problem: Problem, device: torch.device, *, most: int = MOST_ELEMENTS, held: torch.dtype | None = None
) -> Trial:
    """The problem, cut to `most` elements, on random tensors that are made here.

    held: what floating-point tensors are held in, for ATen to be exact; their values, rounded to the
    problem's type, are those that the same random numbers give without it.
    """
    return TRIALS[problem.op](_Operands(cropped(problem, most), device, held))


def cropped(problem: Problem, most: int = MOST_ELEMENTS) -> Problem:
    """The same over as many rows as so many elements of a tensor allow."""
    d, h, w = problem.size
    # A problem's size is that of the input for dgrad, of the output for the other passes.
    inputs = problem.in_channels * (1 if problem.op == "conv3d_dgrad" else math.prod(problem.stride))
    channels = max(inputs, problem.out_channels)
    return replace(problem, size=(max(1, min(d, most // (channels * h * w))), h, w))


@dataclass(frozen=True)
class _Operands:
    problem: Problem
    device: torch.device
    held: torch.dtype | None

    @property
    def stored(self) -> torch.dtype:
        return DTYPES[self.problem.dtype]

    @property
    def summed(self) -> torch.dtype:
        return self.held or torch.float32

    def rounded(self, values: Tensor) -> Tensor:
        return values.to(self.stored).to(self.held or self.stored)

    def empty(self, channels: int, size: Triple) -> Tensor:
        return empty((1, channels, *size), self.held or self.stored, self.device)

    def features(self, channels: int, size: Triple) -> Tensor:
        return self.rounded(empty((1, channels, *size), self.stored, self.device).normal_())

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def terms(self, channels: int) -> NormAct:
        mean, scale, beta = (0.1 * self.values(1, channels) for _ in range(3))
        return NormAct(mean.to(self.summed), (1 + scale).to(self.summed), beta.to(self.summed), SLOPE)

    def prologue(self) -> NormAct | None:
        return self.terms(self.problem.in_channels) if self.problem.prologue else None


def _activated(y: Tensor, terms: NormAct | None) -> Tensor:
    return y if terms is None else aten.norm_act(y, *terms)


# Convolutions, as `effseg.algorithms.triton.fused` runs them: with a prologue also with statistics or the
# gradient through it. ATen's forward and wgrad include the pass that makes their input.


def _forward(o: _Operands) -> Trial:
    window, size, pad = _geometry(o.problem)
    x, weight, terms = o.features(o.problem.in_channels, size), _weight(o), o.prologue()

    def by_aten() -> Results:
        y = aten.convolution(_activated(x, terms), weight, None, window, pad)
        return (y, *_moments(y)) if terms else (y,)

    def by_kernel(config: Config) -> Results:
        y = o.empty(o.problem.out_channels, o.problem.size)
        found = conv3d_forward(
            x, weight, y, window=window, front=pad[0], prologue=terms, statistics=terms is not None,
            config=config,
        )  # fmt: skip
        return (y, *(found or ()))

    return Trial(by_aten, by_kernel)


def _dgrad(o: _Operands) -> Trial:
    window, size, pad = _geometry(o.problem)
    x, weight, terms = o.features(o.problem.in_channels, size), _weight(o), o.prologue()
    grad = o.features(o.problem.out_channels, window.output_size(size))
    a = _activated(x, terms)

    def by_aten() -> Results:
        ga, _ = aten.convolution_backward(grad, a, weight, window, pad, True, False)
        assert ga is not None
        return (ga,) if terms is None else _activation_gradients(ga, x, a, terms)

    def by_kernel(config: Config) -> Results:
        out = o.empty(o.problem.in_channels, size)
        after = None if terms is None else (x, terms)
        sums = conv3d_dgrad(grad, weight, out, window=window, front=pad[0], epilogue=after, config=config)
        return (out, *(sums or ()))

    return Trial(by_aten, by_kernel)


def _wgrad(o: _Operands) -> Trial:
    window, size, pad = _geometry(o.problem)
    x, weight, terms = o.features(o.problem.in_channels, size), _weight(o), o.prologue()
    grad = o.features(o.problem.out_channels, o.problem.size)

    def by_aten() -> Results:
        _, gw = aten.convolution_backward(grad, _activated(x, terms), weight, window, pad, False, True)
        assert gw is not None
        return (gw.to(o.summed),)

    def by_kernel(config: Config) -> Results:
        return (conv3d_wgrad(x, grad, window=window, front=pad[0], prologue=terms, config=config),)

    return Trial(by_aten, by_kernel)


def _geometry(problem: Problem) -> tuple[Window, Triple, tuple[int, int]]:
    """Window, the input's size (a problem has that which its programs tile), rows of zeros around it."""
    window = Window(problem.kernel, problem.stride)
    size = problem.size
    if problem.op != "conv3d_dgrad":
        d, h, w = (n * s for n, s in zip(size, problem.stride, strict=True))
        size = d, h, w
    _, _, pad = window.input_rows(0, window.output_size(size)[0], size[0])
    return window, size, pad


def _weight(o: _Operands) -> Tensor:
    """Keeps the variance of what it is applied to."""
    ci, co, kernel = o.problem.in_channels, o.problem.out_channels, o.problem.kernel
    weight = o.values(co, ci, *kernel) / math.sqrt(ci * math.prod(kernel))
    return o.rounded(weight)


# Elementwise passes and reductions


def _norm_act(o: _Operands) -> Trial:
    channels, size = o.problem.in_channels, o.problem.size
    y, terms = o.features(channels, size), o.terms(channels)

    def by_kernel(config: Config) -> Results:
        out = o.empty(channels, size)
        norm_act(y, terms, out, config=config)
        return (out,)

    return Trial(lambda: (_activated(y, terms),), by_kernel)


def _norm_act_backward(o: _Operands) -> Trial:
    channels, size = o.problem.in_channels, o.problem.size
    grad, y, terms = o.features(channels, size), o.features(channels, size), o.terms(channels)
    a = _activated(y, terms)

    def by_kernel(config: Config) -> Results:
        dy = o.empty(channels, size)
        sums = norm_act_backward(grad, y, terms, activated=a, dy=dy, sums=True, config=config)
        return (dy, *(sums or ()))

    return Trial(lambda: _activation_gradients(grad, y, a, terms), by_kernel)


def _activation_gradients(grad: Tensor, y: Tensor, a: Tensor, terms: NormAct) -> Results:
    found = aten.norm_act_backward(
        grad, y, a, terms.mean, terms.scale, terms.slope, need_dy=True, need_terms=True
    )
    assert found.dy is not None
    assert found.dscale is not None
    assert found.dbeta is not None
    return found.dy, found.dscale, found.dbeta


def _fold(o: _Operands) -> Trial:
    channels, size = o.problem.in_channels, o.problem.size
    grad, y = o.features(channels, size), o.features(channels, size)
    mean, scale, shift, _ = o.terms(channels)

    def by_kernel(config: Config) -> Results:
        out = o.empty(channels, size)
        fold(grad, y, mean, scale, shift, out, config=config)
        return (out,)

    return Trial(lambda: (aten.fold(grad, y, mean[0], scale[0], shift[0]),), by_kernel)


def _statistics(o: _Operands) -> Trial:
    y = o.features(o.problem.in_channels, o.problem.size)
    return Trial(lambda: _moments(y), lambda config: statistics.moments(y, config))


def _moments(y: Tensor) -> Results:
    mean, variance = aten.mean_var(y)
    return mean[None], variance[None]


# Upsampling


def _upsample(o: _Operands) -> Trial:
    channels, size = o.problem.in_channels, o.problem.size
    d, h, w = ((n + 1) // 2 for n in size)
    coarse, addend, rows = o.features(channels, (d, h, w)), o.features(channels, size), (0, size[0])

    def by_kernel(config: Config) -> Results:
        out = o.empty(channels, size)
        upsample_x2(coarse, out, rows=rows, addend=addend, config=config)
        return (out,)

    return Trial(lambda: (aten.upsample_add(coarse, rows, *size[1:], TWICE, addend),), by_kernel)


def _upsample_transpose(o: _Operands) -> Trial:
    channels, size = o.problem.in_channels, o.problem.size
    d, h, w = (2 * n for n in size)
    grad, rows = o.features(channels, (d, h, w)), (0, d)

    def by_aten() -> Results:
        with torch.enable_grad():
            coarse = o.empty(channels, size).requires_grad_()
            fine = aten.upsample_x2(coarse, rows, h, w)
        return torch.autograd.grad(fine, coarse, grad)

    def by_kernel(config: Config) -> Results:
        out = o.empty(channels, size)
        upsample_x2_transpose(grad, out, rows=rows, config=config)
        return (out,)

    return Trial(by_aten, by_kernel)


# Heads


class _HeadOperands:
    """Features, parameters and labels of one slab; ATen's head over them."""

    def __init__(self, o: _Operands) -> None:
        channels, self.classes = o.problem.in_channels, o.problem.out_channels
        self.a = o.features(channels, o.problem.size)
        self.weight = _weight(o).flatten(1)
        self.bias = torch.zeros(self.classes, dtype=self.weight.dtype, device=o.device)
        self.label_dtype = label_dtype(self.classes)
        self.labels = torch.randint(self.classes, o.problem.size, dtype=self.label_dtype, device=o.device)
        self.class_weights = torch.ones(self.classes, device=o.device)
        self.sums = Sums(*(o.values(1, *s).to(o.summed) for s in [(self.classes,)] * 3 + [()] * 3))

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:
        return self.a, self.weight, self.bias, self.labels, self.class_weights, None

    def by_aten(self) -> Head:
        return aten.make_head(self.a, self.weight, self.bias, self.a.device)


def _head_sums(o: _Operands) -> Trial:
    h = _HeadOperands(o)

    def by_aten() -> Results:
        sums = Sums.zeros(1, h.classes, h.a.device)
        h.by_aten().add_sums(sums, 0, h.a, h.labels)
        return tuple(t[0] for t in sums)

    return Trial(by_aten, lambda config: head_sums(*h.arguments, config=config))


def _head_backward(o: _Operands) -> Trial:
    h = _HeadOperands(o)
    given = h.sums.intersection, h.sums.probability, h.sums.nll, h.sums.smooth_nll

    def by_aten() -> Results:
        head = h.by_aten()
        grad = head.pull(h.sums, 0, h.a, h.labels)
        assert head.grad_weight is not None
        assert head.grad_bias is not None
        return grad, head.grad_weight, head.grad_bias

    def by_kernel(config: Config) -> Results:
        out = torch.empty_like(h.a)
        grads = HeadGradients(*(g[0] for g in given))
        weight, bias = head_backward(*h.arguments, grads, out, config=config)
        assert weight is not None
        assert bias is not None
        return out, weight, bias

    return Trial(by_aten, by_kernel)


def _head_argmax(o: _Operands) -> Trial:
    h = _HeadOperands(o)

    def by_aten() -> Results:
        return (h.by_aten().segment(h.a).to(h.label_dtype),)

    def by_kernel(config: Config) -> Results:
        out = torch.empty_like(h.labels)
        head_argmax(h.a, h.weight, h.bias, out, config=config)
        return (out,)

    return Trial(by_aten, by_kernel)


TRIALS: dict[str, Callable[[_Operands], Trial]] = {
    "conv3d_fwd": _forward,
    "conv3d_dgrad": _dgrad,
    "conv3d_wgrad": _wgrad,
    "norm_act": _norm_act,
    "norm_act_backward": _norm_act_backward,
    "fold": _fold,
    "moments": _statistics,
    "upsample": _upsample,
    "upsample_transpose": _upsample_transpose,
    "head_sums": _head_sums,
    "head_backward": _head_backward,
    "head_argmax": _head_argmax,
}
