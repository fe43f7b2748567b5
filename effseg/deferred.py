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
cancel.

A specification (`Spec`) holds no tensor, so that it may live in an autograd context without keeping
memory alive. `Spec.rows` is ordinary differentiable code over small slabs, in the operations of an
algorithm; a slab's gradient is pulled back through it by autograd (`effseg.algorithms.sweeps.pullback`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import CHANNELS_LAST, Algorithm
from effseg.slabs import Window

Rows = tuple[int, int]


@dataclass(frozen=True)
class Use:
    """Which part of a stored tensor a slab needs: some rows of one sample, one sample, or all of it.

    centre: of a normalisation, whose scale and beta follow; its gradient is -scale times that of beta.
    """

    rows: Rows | None = None
    per_sample: bool = False
    centre: bool = False

    def cut(self, tensor: Tensor, sample: int) -> Tensor:
        if self.rows is not None:
            return tensor[sample : sample + 1, :, self.rows[0] : self.rows[1]]
        return tensor[sample : sample + 1] if self.per_sample else tensor


SHARED = Use()  # weights, which come in the compute type
PER_SAMPLE = Use(per_sample=True)
TERMS = (Use(per_sample=True, centre=True), PER_SAMPLE, PER_SAMPLE)


@dataclass(frozen=True)
class Spec(ABC):
    """How rows are made. `shape` is (N, C, D, H, W) of the value, `dtype` its (compute) type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def uses(self, lo: int, hi: int) -> list[Use]:
        """What rows [lo, hi) need of each stored tensor, in the order of `Deferred.tensors`."""

    @abstractmethod
    def rows(self, ops: Algorithm, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        """Rows [lo, hi) of one sample, (1, C, hi - lo, H, W), from the tensors cut as `uses` says, those that
        are SHARED `in_compute_type`."""


def in_compute_type(spec: Spec, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with weights as a sweep's slabs take them: in the compute type, kernels channels last."""
    uses = spec.uses(0, spec.shape[2])
    return [_low(t, spec.dtype) if use == SHARED else t for use, t in zip(uses, tensors, strict=True)]


def _low(weight: Tensor, dtype: torch.dtype) -> Tensor:
    layout = CHANNELS_LAST if weight.dim() == 5 else torch.preserve_format
    return weight.detach().to(dtype, memory_format=layout)


class Deferred(NamedTuple):
    """An expression of value (N, C, D, H, W): its specification and the tensors it is made of: features (N,
    C', D', H', W'), terms (N, C') and weights."""

    spec: Spec
    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, D, H, W) of the value."""
        return self.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type that the value is computed in."""
        return self.spec.dtype

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.tensors[0].device


class Normalisation(NamedTuple):
    """norm(y) = (y - mean) * scale + beta, each (N, C) in the accumulation type."""

    mean: Tensor
    scale: Tensor
    beta: Tensor


@dataclass(frozen=True)
class Plain(Spec):
    def uses(self, lo: int, hi: int) -> list[Use]:
        return [Use((lo, hi))]

    def rows(self, ops: Algorithm, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].to(self.dtype)


@dataclass(frozen=True)
class Raw(Spec):
    slope: float

    def uses(self, lo: int, hi: int) -> list[Use]:
        return [Use((lo, hi)), *TERMS]

    def rows(self, ops: Algorithm, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        y, mean, scale, beta = tensors
        return ops.norm_act(y, mean, scale, beta, self.slope)


@dataclass(frozen=True)
class Residual(Spec):
    slope: float
    inner: Spec

    def uses(self, lo: int, hi: int) -> list[Use]:
        return [*self.inner.uses(lo, hi), Use((lo, hi)), *TERMS]

    def rows(self, ops: Algorithm, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        *inner, y, mean, scale, beta = tensors
        return ops.norm_act(y, mean, scale, beta, self.slope, addend=self.inner.rows(ops, lo, hi, inner))


@dataclass(frozen=True)
class Conv(Spec):
    slope: float
    inner: Spec
    window: Window

    def uses(self, lo: int, hi: int) -> list[Use]:
        first, last, _ = self.window.input_rows(lo, hi, self.inner.shape[2])
        return [*self.inner.uses(first, last), SHARED, *TERMS]

    def rows(self, ops: Algorithm, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
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

    def rows(self, ops: Algorithm, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        first, last = self.coarse_rows(lo, hi)
        end = len(tensors) - 1 - self.has_bias
        coarse = self.coarse.rows(ops, first, last, tensors[self.skip_tensors : end])
        bias = tensors[-1] if self.has_bias else None
        projected = ops.convolution(coarse, tensors[end], bias, Window((1, 1, 1)), (0, 0))
        wanted = lo - 2 * first, hi - 2 * first
        addend = self.skip.rows(ops, lo, hi, tensors[: self.skip_tensors]) if self.skip else None
        return ops.upsample_add(projected, wanted, self.shape[3], self.shape[4], self.factors, addend)


def plain(x: Tensor, dtype: torch.dtype | None = None) -> Deferred:
    """x itself, (N, C, D, H, W), converted to `dtype` slab by slab. Raises `ValueError` for other shapes."""
    expect("x", x.dim() == 5, "(N, C, D, H, W)", tuple(x.shape))
    dtype = dtype or x.dtype
    expect("dtype", dtype.is_floating_point, "a floating-point type", dtype)
    return Deferred(Plain(tuple(x.shape), dtype), (x,))


def raw(y: Tensor, norm: Normalisation, slope: float) -> Deferred:
    """leaky_relu((y - mean) * scale + beta, slope) of a raw convolution output y (N, C, D, H, W).

    slope: 0 or more; 0 is ReLU, 1 no activation. Raises `ValueError` for terms that are not (N, C).
    """
    _check_layer(tuple(y.shape), norm, slope)
    return Deferred(Raw(tuple(y.shape), y.dtype, slope), (y, *norm))


def residual(inner: Deferred, y: Tensor, norm: Normalisation, slope: float) -> Deferred:
    """leaky_relu(inner + (y - mean) * scale + beta, slope), inner and y of one shape, (N, C, D, H, W).

    Raises `ValueError` as `raw` does, and where the shapes differ.
    """
    _check_layer(tuple(y.shape), norm, slope)
    expect("inner", inner.shape == tuple(y.shape), tuple(y.shape), inner.shape)
    return Deferred(Residual(tuple(y.shape), y.dtype, slope, inner.spec), (*inner.tensors, y, *norm))


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


def _check_layer(shape: tuple[int, ...], norm: Normalisation, slope: float) -> None:
    expect("y", len(shape) == 5, "(N, C, D, H, W)", shape)
    for name, term in zip(norm._fields, norm, strict=True):
        expect(name, tuple(term.shape) == shape[:2], f"(N, C) = {shape[:2]}", tuple(term.shape))
    expect("slope", slope >= 0, "0 or more", slope)


def expect(name: str, fits: bool, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {got}")
