"""Deferred expressions that join and resample others, so that neither is ever stored.

=================== ============================================== =================================
kind                value                                          stored
=================== ============================================== =================================
`Concatenation`     cat(first, second, ...) along the channels     what the parts store
`TransposedConv`    conv_transpose(inner, w), kernel = stride      what inner stores
`Pooling`           max or average over blocks of voxels           what inner stores
`Padded`            inner, then its last voxels again              what inner stores
`Activation`        elu, gelu, silu or prelu of inner              what inner stores
`Sum`               first + second                                 what the parts store
`Cast`              inner, rounded to another type                 what inner stores
`Shared`            inner                                          what inner stores, and nothing
=================== ============================================== =================================

A transposed convolution whose kernel is its stride multiplies every voxel by one matrix, 27 times less
arithmetic than the 3x3x3 convolution that reads it: making it again costs little, storing it a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from effseg.common.formats import CHANNELS_LAST
from effseg.common.settings import Function
from effseg.expressions.base import SHARED, Deferred, Operations, Rows, Spec, Standing, Use, expect

Triple = tuple[int, int, int]
POOLINGS = ("max", "average")
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "prelu": F.prelu,
}
"""Elementwise functions other than leaky ReLU, of x and what else they take."""


@dataclass(frozen=True)
class Concatenation(Spec):
    """ends: where the tensors of each part end among all."""

    parts: tuple[Spec, ...]
    ends: tuple[int, ...]

    def uses(self, lo: int, hi: int) -> list[Use]:
        return [use for part in self.parts for use in part.uses(lo, hi)]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        spans = pairwise((0, *self.ends))
        given = [(part, tensors[start:end]) for part, (start, end) in zip(self.parts, spans, strict=True)]
        if not any(isinstance(part, TransposedConv) for part in self.parts):
            return torch.cat([part.rows(ops, lo, hi, own).to(self.dtype) for part, own in given], 1)
        size = (self.shape[1], hi - lo, *self.shape[3:])
        made = [
            part.blocks(ops, lo, hi, own) if isinstance(part, TransposedConv) else part.rows(ops, lo, hi, own)
            for part, own in given
        ]
        return Placed.apply(size, self.dtype, lo, *made)


@dataclass(frozen=True)
class TransposedConv(Spec):
    inner: Spec
    stride: Triple
    has_bias: bool

    def coarse_rows(self, lo: int, hi: int) -> Rows:
        return lo // self.stride[0], -(-hi // self.stride[0])

    def uses(self, lo: int, hi: int) -> list[Use]:
        return [*self.inner.uses(*self.coarse_rows(lo, hi)), *[SHARED] * (1 + self.has_bias)]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        size = (self.shape[1], hi - lo, *self.shape[3:])
        return Placed.apply(size, self.dtype, lo, self.blocks(ops, lo, hi, tensors))

    def blocks(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        """(d, h, w, kd, kh, kw, C), of every coarse voxel that rows [lo, hi) come of: one matrix product."""
        end = len(tensors) - 1 - self.has_bias
        x = self.inner.rows(ops, *self.coarse_rows(lo, hi), tensors[:end])
        weight, bias = tensors[end], tensors[-1] if self.has_bias else None
        voxels = x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1])
        matrix = weight.permute(0, 2, 3, 4, 1).flatten(1)
        found = (
            voxels @ matrix if bias is None else torch.addmm(bias.repeat(prod(self.stride)), voxels, matrix)
        )
        return found.view(*x.shape[2:], *self.stride, weight.shape[1])


class Placed(Function):
    """Parts side by side along the channels, each value written once, to its place: rows (1, C, d, H, W), or
    the `blocks` of a transposed convolution, of which rows from `lo` on are wanted. Saved: nothing."""

    @staticmethod
    def forward(ctx, size, dtype, lo, *parts):  # type: ignore[no-untyped-def]
        ctx.lo, ctx.like = lo, [(part.shape, part.dtype) for part in parts]
        out = torch.empty((1, *size), dtype=dtype, device=parts[0].device, memory_format=CHANNELS_LAST)
        for part, place in zip(parts, _places(ctx.like, out), strict=True):
            if part.dim() == 5:
                place.copy_(part)
                continue
            for taken, rows in _layers(part, place, lo):
                rows.copy_(taken)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        pulled = [
            _pulled(shape, dtype, place, ctx.lo) if needed else None
            for (shape, dtype), place, needed in zip(
                ctx.like, _places(ctx.like, grad), ctx.needs_input_grad[3:], strict=True
            )
        ]
        return None, None, None, *pulled


def _pulled(shape: torch.Size, dtype: torch.dtype, place: Tensor, lo: int) -> Tensor:
    """The gradient of a part from that of its place."""
    if len(shape) == 5:
        return place.to(dtype)
    part = place.new_empty(shape, dtype=dtype)
    if lo % shape[3] or place.shape[2] % shape[3]:
        # Of the first blocks or the last ones not all rows are wanted.
        part[:1].zero_()
        part[-1:].zero_()
    for taken, rows in _layers(part, place, lo):
        taken.copy_(rows)
    return part


def _places(like: Sequence[tuple[torch.Size, torch.dtype]], out: Tensor) -> Sequence[Tensor]:
    """Each part's channels of (1, C, D, H, W)."""
    return out.split([shape[1] if len(shape) == 5 else shape[-1] for shape, _ in like], 1)


def _layers(blocks: Tensor, place: Tensor, lo: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Layer after layer of the blocks, and the rows of (1, C, D, H, W) where it lies, D beginning with row
    `lo`: two views (rows, h, kh, w, kw, C)."""
    depth, kernel = blocks.shape[3], blocks.shape[3:6]
    voxels = place.permute(0, 2, 3, 4, 1)[0]
    for layer in range(depth):
        first = (layer - lo) % depth
        rows = voxels[first::depth].unflatten(2, (-1, kernel[2])).unflatten(1, (-1, kernel[1]))
        skipped = (first + lo % depth) // depth
        yield blocks[skipped : skipped + len(rows), :, :, layer].permute(0, 1, 3, 2, 4, 5), rows


@dataclass(frozen=True)
class Pooling(Spec):
    """Blocks of `window` voxels; `ceil`: the last ones may be cut off by the border (maximum only)."""

    inner: Spec
    kind: str
    window: Triple
    ceil: bool

    def fine_rows(self, lo: int, hi: int) -> Rows:
        return lo * self.window[0], min(hi * self.window[0], self.inner.shape[2])

    def uses(self, lo: int, hi: int) -> list[Use]:
        return self.inner.uses(*self.fine_rows(lo, hi))

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        fine = self.inner.rows(ops, *self.fine_rows(lo, hi), tensors)
        if self.kind == "max":
            return F.max_pool3d(fine, self.window, ceil_mode=self.ceil)
        return F.avg_pool3d(fine, self.window)


@dataclass(frozen=True)
class Padded(Spec):
    """The last voxels of each axis again as far as the shape goes."""

    inner: Spec

    def inner_rows(self, lo: int, hi: int) -> Rows:
        d = self.inner.shape[2]
        return min(lo, d - 1), min(hi, d)

    def uses(self, lo: int, hi: int) -> list[Use]:
        return self.inner.uses(*self.inner_rows(lo, hi))

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        first, last = self.inner_rows(lo, hi)
        a = self.inner.rows(ops, first, last, tensors)
        beyond = [want - have for want, have in zip(self.shape[3:], a.shape[3:], strict=True)]
        return F.pad(a, (0, beyond[1], 0, beyond[0], 0, (hi - lo) - (last - first)), mode="replicate")


@dataclass(frozen=True)
class Activation(Spec):
    """options: keyword arguments of the function; has_weight: whether a slope, for all channels or for each,
    is its second argument."""

    inner: Spec
    kind: str
    options: tuple[tuple[str, float | str], ...]
    has_weight: bool

    def uses(self, lo: int, hi: int) -> list[Use]:
        return [*self.inner.uses(lo, hi), *[SHARED] * self.has_weight]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        end = len(tensors) - self.has_weight
        x = self.inner.rows(ops, lo, hi, tensors[:end])
        return ACTIVATIONS[self.kind](x, *tensors[end:], **dict(self.options))


@dataclass(frozen=True)
class Sum(Spec):
    """first_tensors: how many tensors are those of the first part. Each part is rounded to its own type."""

    first: Spec
    second: Spec
    first_tensors: int

    def uses(self, lo: int, hi: int) -> list[Use]:
        return [*self.first.uses(lo, hi), *self.second.uses(lo, hi)]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        first = self.first.rows(ops, lo, hi, tensors[: self.first_tensors])
        return first + self.second.rows(ops, lo, hi, tensors[self.first_tensors :])


@dataclass(frozen=True)
class Cast(Spec):
    inner: Spec

    def uses(self, lo: int, hi: int) -> list[Use]:
        return self.inner.uses(lo, hi)

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        return self.inner.rows(ops, lo, hi, tensors).to(self.dtype)


@dataclass(frozen=True)
class Shared(Spec):
    """inner, whose gradient goes to one tensor that stands for it: see `effseg.operators.share`."""

    inner: Spec

    def uses(self, lo: int, hi: int) -> list[Use]:
        return [Use((lo, hi), of=self.shape[2], stands=True), *self.inner.uses(lo, hi)]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        standing, *inner = tensors
        return Standing.apply(standing, self.inner.rows(ops, lo, hi, inner))


def concatenation(parts: Sequence[Deferred]) -> Deferred:
    """torch.cat(parts, 1), in the widest of their types. Raises `ValueError` where their sizes differ."""
    first = parts[0]
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    for i, part in enumerate(parts):
        expected = (first.shape[0], *first.shape[2:])
        got = (part.shape[0], *part.shape[2:])
        expect(f"parts[{i}]", got == expected, f"(N, D, H, W) = {expected}", got)
    shape = (first.shape[0], sum(part.shape[1] for part in parts), *first.shape[2:])
    tensors = tuple(t for part in parts for t in part.tensors)
    counts = [len(part.tensors) for part in parts]
    ends = tuple(sum(counts[: i + 1]) for i in range(len(counts)))
    return Deferred(Concatenation(shape, dtype, tuple(p.spec for p in parts), ends), tensors)


def transposed_conv(inner: Deferred, weight: Tensor, bias: Tensor | None = None) -> Deferred:
    """conv_transpose3d(inner, weight, bias, stride=kernel); weight (Ci, Co, kd, kh, kw)."""
    expect("weight", weight.dim() == 5, "(Ci, Co, kd, kh, kw)", tuple(weight.shape))
    expect("weight", weight.shape[0] == inner.shape[1], f"Ci = {inner.shape[1]}", weight.shape[0])
    kd, kh, kw = weight.shape[2:]
    n, _, d, h, w = inner.shape
    shape = (n, weight.shape[1], d * kd, h * kh, w * kw)
    spec = TransposedConv(shape, inner.dtype, inner.spec, (kd, kh, kw), bias is not None)
    return Deferred(spec, (*inner.tensors, weight) if bias is None else (*inner.tensors, weight, bias))


def padded(inner: Deferred, beyond: Triple) -> Deferred:
    """F.pad(inner, ..., mode="replicate") by so many voxels after the last of each axis."""
    size = [n + more for n, more in zip(inner.shape[2:], beyond, strict=True)]
    return Deferred(Padded((*inner.shape[:2], *size), inner.dtype, inner.spec), inner.tensors)


def pooling(inner: Deferred, kind: str, window: Triple, ceil: bool = False) -> Deferred:
    """max_pool3d or avg_pool3d over blocks that do not overlap; kind: "max" or "average"."""
    expect("kind", kind in POOLINGS, " or ".join(POOLINGS), kind)
    expect("ceil", not ceil or kind == "max", "False for averages", ceil)
    size = [(-(-n // k) if ceil else n // k) for n, k in zip(inner.shape[2:], window, strict=True)]
    expect("inner", min(size) > 0, f"at least {window} voxels", inner.shape[2:])
    spec = Pooling((*inner.shape[:2], *size), inner.dtype, inner.spec, kind, window, ceil)
    return Deferred(spec, inner.tensors)


def activation(inner: Deferred, kind: str, weight: Tensor | None = None, **options: float | str) -> Deferred:
    """A function of ACTIVATIONS of every element of inner; weight: a slope (1,) or (C,) for "prelu"."""
    expect("kind", kind in ACTIVATIONS, " or ".join(ACTIVATIONS), kind)
    expect("weight", (weight is not None) == (kind == "prelu"), 'one for "prelu" alone', weight)
    slopes = None if weight is None else tuple(weight.shape)
    expect("weight", slopes in (None, (1,), (inner.shape[1],)), f"(1,) or ({inner.shape[1]},)", slopes)
    spec = Activation(
        inner.shape, inner.dtype, inner.spec, kind, tuple(sorted(options.items())), weight is not None
    )
    return Deferred(spec, inner.tensors if weight is None else (*inner.tensors, weight))


def added(first: Deferred, second: Deferred) -> Deferred:
    """first + second, of one shape, in the wider of their types."""
    expect("second", second.shape == first.shape, first.shape, second.shape)
    dtype = torch.promote_types(first.dtype, second.dtype)
    spec = Sum(first.shape, dtype, first.spec, second.spec, len(first.tensors))
    return Deferred(spec, (*first.tensors, *second.tensors))


def cast(inner: Deferred, dtype: torch.dtype) -> Deferred:
    """inner.to(dtype)."""
    return inner if inner.dtype == dtype else Deferred(Cast(inner.shape, dtype, inner.spec), inner.tensors)
