"""Statistics of a convolution whose output is not stored, with a gradient that needs no second sweep.

With y = conv(x, w) over M voxels, patch p_v (Ci * taps numbers) at voxel v and y_c = w_c . p:

    d mean_c / d w_c = P / M,                 P   = sum_v p_v
    d var_c / d w_c  = 2 (Q_c - mean_c P) / M, Q_c = sum_v y_c(v) p_v

P and Q are a wgrad with y and 1 as the output gradient, so the forward sweep collects them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm
from effseg.algorithms.pullback import rows
from effseg.common.formats import CHANNELS_LAST, accumulation_dtype
from effseg.expressions.base import Deferred, readable
from effseg.expressions.layers import Plain
from effseg.expressions.slabs import Window, rows_per_slab, slabs
from effseg.operators.moments import Moments
from effseg.operators.operator import Operator
from effseg.parallel.reduction import summed


class Static(NamedTuple):
    """rows: of the whole volume."""

    window: Window
    dtype: torch.dtype
    slab_elements: int | None
    rows: int

    def output(self, image: Tensor) -> tuple[int, int, int]:
        """(D, H, W) of the convolution's output, of the whole volume."""
        return self.window.output_size((self.rows, image.shape[3], image.shape[4]))


def stem_statistics(
    x: Deferred, weight: Tensor, window: Window, slab_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """See `effseg.functional.stem_statistics`. x: `plain`."""
    assert isinstance(x.spec, Plain)
    static = Static(window, x.dtype, slab_elements, x.shape[2])
    mean, var = _operator(x.device, x.dtype, static, (*x.tensors, weight))
    return mean, var


def _forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """mean and var; P and Q, (C + 1) * Ci * taps numbers a sample, so that backward sweeps nothing."""
    image, weight = tensors
    mean, var, p, q = stem_statistics_forward(ops, image, weight, static)
    return (mean, var), (p.clone(memory_format=torch.contiguous_format), q)  # p is part of a tensor


def _backward(
    ops: Algorithm,
    static: Static,
    own: tuple[Tensor, Tensor],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: tuple[Tensor, Tensor],
) -> tuple[None, Tensor]:
    """The image gets no gradient. P and Q are of this process's rows."""
    (p, q), (image, weight) = own, tensors
    grad_mean, grad_var = summed(grads)
    voxels = math.prod(static.output(image))
    return None, stem_statistics_backward(p, q, grad_mean, grad_var, voxels, weight.dtype)


def _fake(ops: Algorithm, static: Static, tensors: Sequence[Tensor]) -> list[Tensor]:
    image, weight = tensors
    n, (co, *taps) = image.shape[0], weight.shape
    mean, var = (weight.new_empty(n, co, dtype=accumulation_dtype(static.dtype)) for _ in range(2))
    return [mean, var, *(weight.new_empty(n, c, *taps, dtype=torch.float64) for c in (1, co))]


_operator = Operator("stem_statistics", Static, _forward, _backward, _fake, outputs=2, zeros=True)


def stem_statistics_forward(
    ops: Algorithm,
    image: Tensor,
    weight: Tensor,
    static: Static,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, variance (N, C) of conv(image, weight) as stored in `dtype`, and float64 P (N, 1, Ci, k, k, k)
    and centred Q - mean P (N, C, Ci, k, k, k), both over this process's rows."""
    window, dtype = static.window, static.dtype
    n, channels, accumulate = image.shape[0], weight.shape[0], accumulation_dtype(dtype)
    out = static.output(image)
    spec = Plain((n, image.shape[1], static.rows, *image.shape[3:]), dtype)
    low = weight.to(dtype, memory_format=CHANNELS_LAST)
    shaped = weight.new_empty(channels + 1, *weight.shape[1:], dtype=accumulate)
    moments = Moments(ops, (n, channels), dtype, image.device)
    sums = [torch.zeros_like(shaped, dtype=torch.float64) for _ in range(n)]
    # Centring on the first slab's mean keeps Q small; the rest of the way to the mean is made at the end.
    reference: dict[int, Tensor] = {}
    rows_of_slab = rows_per_slab(out[0], channels * out[1] * out[2], static.slab_elements, image.device)
    stored = readable(spec, (image,), window, rows_of_slab)
    for sample, lo, hi, _ in slabs(n, out[0], rows_of_slab):
        first, last, pad = window.input_rows(lo, hi, static.rows)
        x = rows(ops, spec, stored, sample, first, last)
        y = ops.convolution(x, low, None, window, pad)
        moments.add(sample, y)
        if sample not in reference:
            reference[sample] = ops.mean_var(y)[0]
        grads = torch.empty(
            (1, channels + 1, *y.shape[2:]), dtype=accumulate, device=y.device, memory_format=CHANNELS_LAST
        )
        torch.sub(y, reference[sample][:, None, None, None], out=grads[:, :channels])
        grads[:, channels:].fill_(1)
        _, part = ops.convolution_backward(grads, x.to(accumulate), shaped, window, pad, False, True)
        assert part is not None
        sums[sample] += part
        del x, y, grads
    mean, var = moments.merge((n, channels, *out))
    total = torch.stack(sums)
    p, q = total[:, channels:], total[:, :channels]
    if reference:  # else no slab was this process's
        centre = torch.stack([reference[sample] for sample in range(n)])
        q = q + (centre.double() - mean.double())[..., None, None, None, None] * p
    return mean, var, p, q


def stem_statistics_backward(
    p: Tensor, q: Tensor, grad_mean: Tensor, grad_var: Tensor, voxels: int, dtype: torch.dtype
) -> Tensor:
    """The weight's gradient, in its type."""
    mean, var = (g.double()[..., None, None, None, None] for g in (grad_mean, grad_var))
    return ((mean * p + 2 * var * q) / voxels).sum(0).to(dtype)
