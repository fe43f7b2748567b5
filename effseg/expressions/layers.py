"""Deferred expressions: tensors that are never stored.

A deferred expression yields any rows [lo, hi) of its first spatial axis from what *is* stored: raw
convolution outputs, per-(n, c) normalisation terms and weights. Expressions nest, and hold their tensors
in one flat tuple so that an operator can hand them to autograd as ordinary inputs:

========== ======================================================= =================================
kind       value                                                   stored
========== ======================================================= =================================
`Plain`    x                                                       x
`Raw`      leaky_relu(norm(y))                                     y
`Residual` leaky_relu(inner + norm(y))                             what inner stores, y
`Conv`     leaky_relu(norm(conv(inner, w)))                        what inner stores
`UpAdd`    skip + upsample_x2(conv1x1(coarse, w))                  what skip and coarse store
========== ======================================================= =================================

with norm(y) = (y - mean) * scale + beta per sample and channel. The terms are (mean, scale, beta) and not
(scale, shift) because the gradient of scale is then the centred sum of dz * (y - mean), which does not
cancel. A raw output y may lie in the host's memory (`held`): two tensors then take its place, one without
memory that its gradient comes to, and one there.

A specification (`Spec`) holds no tensor, so that it may live in an autograd context without keeping
memory alive. `Spec.rows` is ordinary differentiable code over small slabs, in the operations of an
algorithm; a slab's gradient is pulled back through it by autograd (`effseg.algorithms.pullback`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effseg.expressions.base import (
    SHARED,
    TERMS,
    Deferred,
    Normalisation,
    Operations,
    Rows,
    Spec,
    Standing,
    Use,
    expect,
)
from effseg.expressions.slabs import Window
from effseg.parallel.partition import current, own_shape


@dataclass(frozen=True)
class Plain(Spec):
    def uses(self, lo: int, hi: int) -> list[Use]:
        return [Use((lo, hi), of=self.shape[2])]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].to(self.dtype)


@dataclass(frozen=True)
class Raw(Spec):
    slope: float
    held: bool = False

    def uses(self, lo: int, hi: int) -> list[Use]:
        return [*_raw_uses(lo, hi, self.shape[2], self.held), *TERMS]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        *stored, mean, scale, beta = tensors
        return ops.norm_act(_raw_rows(stored), mean, scale, beta, self.slope)


@dataclass(frozen=True)
class Residual(Spec):
    slope: float
    inner: Spec
    held: bool = False

    def uses(self, lo: int, hi: int) -> list[Use]:
        return [*self.inner.uses(lo, hi), *_raw_uses(lo, hi, self.shape[2], self.held), *TERMS]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        *others, mean, scale, beta = tensors
        end = len(others) - 1 - self.held
        addend = self.inner.rows(ops, lo, hi, others[:end])
        return ops.norm_act(_raw_rows(others[end:]), mean, scale, beta, self.slope, addend=addend)


def _raw_uses(lo: int, hi: int, of: int, held: bool) -> list[Use]:
    own = Use((lo, hi), of=of, stands=held)
    return [own, Use((lo, hi), of=of, held=True)] if held else [own]


def _raw_rows(stored: Sequence[Tensor]) -> Tensor:
    """A raw output; or what stands for it, and its rows from the host's memory."""
    y: Tensor = stored[0] if len(stored) == 1 else Standing.apply(*stored)
    return y


@dataclass(frozen=True)
class Conv(Spec):
    slope: float
    inner: Spec
    window: Window

    def uses(self, lo: int, hi: int) -> list[Use]:
        first, last, _ = self.window.input_rows(lo, hi, self.inner.shape[2])
        return [*self.inner.uses(first, last), SHARED, *TERMS]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        *inner, weight, mean, scale, beta = tensors
        first, last, pad = self.window.input_rows(lo, hi, self.inner.shape[2])
        a = self.inner.rows(ops, first, last, inner)
        y = ops.convolution(a, weight, None, self.window, pad)
        return ops.norm_act(y, mean, scale, beta, self.slope)


@dataclass(frozen=True)
class UpAdd(Spec):
    """Optional skip, coarse and its 1x1x1 convolution (which commutes with the upsampling, so it runs on
    the coarse grid). Where the factor is 2 the fine size is 2n or 2n - 1: the last plane of an odd axis is
    cut off."""

    skip: Spec | None
    coarse: Spec
    skip_tensors: int
    has_bias: bool
    factors: tuple[int, int, int]

    def coarse_rows(self, lo: int, hi: int) -> Rows:
        """A row of halo on each side: what the slab's border clamp spoils is cut off afterwards."""
        if self.factors[0] == 1:
            return lo, hi
        return max(lo // 2 - 1, 0), min((hi - 1) // 2 + 2, self.coarse.shape[2])

    def uses(self, lo: int, hi: int) -> list[Use]:
        skip = self.skip.uses(lo, hi) if self.skip else []
        return [*skip, *self.coarse.uses(*self.coarse_rows(lo, hi)), *[SHARED] * (1 + self.has_bias)]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        first, last = self.coarse_rows(lo, hi)
        end = len(tensors) - 1 - self.has_bias
        coarse = self.coarse.rows(ops, first, last, tensors[self.skip_tensors : end])
        bias = tensors[-1] if self.has_bias else None
        projected = ops.convolution(coarse, tensors[end], bias, Window((1, 1, 1)), (0, 0))
        wanted = lo - 2 * first, hi - 2 * first
        addend = self.skip.rows(ops, lo, hi, tensors[: self.skip_tensors]) if self.skip else None
        return ops.upsample_add(projected, wanted, self.shape[3], self.shape[4], self.factors, addend)


def plain(x: Tensor, dtype: torch.dtype | None = None, rows: int | None = None) -> Deferred:
    """x itself, (N, C, D, H, W), converted to `dtype` slab by slab. rows: those of the volume of which x is
    this process's part, where it is split. Raises `ValueError` for other shapes."""
    expect("x", x.dim() == 5, "(N, C, D, H, W)", tuple(x.shape))
    dtype = dtype or x.dtype
    expect("dtype", dtype.is_floating_point, "a floating-point type", dtype)
    return Deferred(Plain(_whole("x", x, rows), dtype), (x,))


def raw(
    y: Tensor, norm: Normalisation, slope: float, rows: int | None = None, held: Tensor | None = None
) -> Deferred:
    """leaky_relu((y - mean) * scale + beta, slope) of a raw convolution output y (N, C, D, H, W).

    slope: 0 or more; 0 is ReLU, 1 no activation; rows: as for `plain`; held: y's values in the host's memory,
    where y only stands for them. Raises `ValueError` for terms that are not (N, C).
    """
    shape = _whole("y", y, rows)
    _check_layer(shape, norm, slope)
    there = () if held is None else (held,)
    return Deferred(Raw(shape, y.dtype, slope, held is not None), (y, *there, *norm))


def residual(
    inner: Deferred, y: Tensor, norm: Normalisation, slope: float, held: Tensor | None = None
) -> Deferred:
    """leaky_relu(inner + (y - mean) * scale + beta, slope), inner and y of one shape, (N, C, D, H, W).

    held: as for `raw`. Raises `ValueError` as `raw` does, and where the shapes differ.
    """
    expect("y", y.dim() == 5, "(N, C, D, H, W)", tuple(y.shape))
    own = own_shape(inner.shape)
    expect("inner", own == tuple(y.shape), tuple(y.shape), own)
    _check_layer(inner.shape, norm, slope)
    there = () if held is None else (held,)
    spec = Residual(inner.shape, y.dtype, slope, inner.spec, held is not None)
    return Deferred(spec, (*inner.tensors, y, *there, *norm))


def convolved(inner: Deferred, weight: Tensor, window: Window, norm: Normalisation, slope: float) -> Deferred:
    """leaky_relu(norm(conv(inner, weight)), slope): a layer whose output is made again where it is used.

    inner: (N, Ci, D, H, W); weight (C, Ci, kd, kh, kw); window: its kernel, stride and zero padding, as
    `convolution_window` makes it. Raises `ValueError` where weight or terms do not fit.
    """
    d, h, w = inner.shape[2:]
    shape = (inner.shape[0], weight.shape[0], *window.output_size((d, h, w)))
    _check_layer(shape, norm, slope)
    expected = (weight.shape[0], inner.shape[1], *window.kernel)
    expect("weight", tuple(weight.shape) == expected, expected, tuple(weight.shape))
    return Deferred(Conv(shape, inner.dtype, slope, inner.spec, window), (*inner.tensors, weight, *norm))


def upsample_add(
    skip: Deferred | None,
    coarse: Deferred,
    weight: Tensor,
    bias: Tensor | None = None,
    size: tuple[int, int, int] | None = None,
    factors: tuple[int, int, int] = (2, 2, 2),
) -> Deferred:
    """skip + crop(upsample(conv1x1(coarse, weight, bias))), trilinear, align_corners=False.

    weight: (C, Cc, 1, 1, 1); factors: 2 or 1 per axis. Without a skip, `size` is the fine grid's (D, H, W):
    2n or 2n - 1 along an axis of factor 2, n along one of factor 1. Raises `ValueError` where sizes, channels
    or factors do not fit.
    """
    if skip is not None:
        size = (skip.shape[2], skip.shape[3], skip.shape[4])
    if size is None:
        raise ValueError("size: expected (D, H, W) where there is no skip, got None")
    expected = (weight.shape[0], coarse.shape[1], 1, 1, 1)
    expect("weight", tuple(weight.shape) == expected, expected, tuple(weight.shape))
    expect("factors", set(factors) <= {1, 2}, "1 or 2 per axis", factors)
    halved = tuple(-(-s // f) for s, f in zip(size, factors, strict=True))
    expect("coarse", coarse.shape[2:] == halved, f"(D, H, W) = {halved} for {size}", coarse.shape[2:])
    shape = (coarse.shape[0], weight.shape[0], *size)
    expect("skip", skip is None or skip.shape == shape, shape, skip and skip.shape)
    before = skip.tensors if skip else ()
    after = (weight,) if bias is None else (weight, bias)
    spec = UpAdd(
        shape, coarse.dtype, skip.spec if skip else None, coarse.spec, len(before), bias is not None, factors
    )
    return Deferred(spec, (*before, *coarse.tensors, *after))


def _whole(name: str, tensor: Tensor, rows: int | None) -> tuple[int, ...]:
    """The shape of the volume of which a tensor is this process's part; its own where none is split."""
    shape = tuple(tensor.shape)
    if rows is None:
        expect(name, current() is None, "rows, those of the whole volume, where it is split", "None")
        return shape
    expect(name, tensor.dim() == 5, "(N, C, D, H, W)", shape)
    whole = (*shape[:2], rows, *shape[3:])
    expect(name, own_shape(whole) == shape, f"this process's part of {whole}, {own_shape(whole)}", shape)
    return whole


def _check_layer(shape: tuple[int, ...], norm: Normalisation, slope: float) -> None:
    expect("y", len(shape) == 5, "(N, C, D, H, W)", shape)
    for name, term in zip(norm._fields, norm, strict=True):
        expect(name, tuple(term.shape) == shape[:2], f"(N, C) = {shape[:2]}", tuple(term.shape))
    expect("slope", slope >= 0, "0 or more", slope)
