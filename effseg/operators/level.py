"""A level that is run again for its backward pass: the unit that enters it and a residual block.

    y0 = conv(x)       a0 = act(norm(y0))
    y1 = conv(a0)      a1 = act(norm(y1))
    y2 = conv(a1)      out = act(a0 + norm(y2))

Of all this only statistics are kept. The backward pass makes y0, y1 and y2 again, and from then on four
tensors of the level's size live: every gradient takes the place of what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm
from effseg.algorithms.pullback import rows
from effseg.expressions.base import Deferred, Normalisation, Spec, made_by, readable
from effseg.expressions.layers import plain, raw, residual
from effseg.expressions.slabs import Slab, Window, slabs
from effseg.operators.conv3d import conv3d_backward, conv3d_forward, through_statistics
from effseg.operators.materialise import materialise_backward, materialise_forward, thickness
from effseg.operators.norm_backward import NormBackward
from effseg.operators.normalisation import Merging, Running, terms
from effseg.operators.operator import Operator

UNITS = 3


class Unit(NamedTuple):
    """A convolution without bias, a norm and an activation, without parameters."""

    window: Window
    how: Merging
    running: Running
    slope: float


class Parameters(NamedTuple):
    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None


class ParametersGradients(NamedTuple):
    weight: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None


FromNorm = tuple[Tensor | None, Tensor | None]
"""Gradients of mean and variance."""


class Statistics(NamedTuple):
    """Mean and biased variance of a convolution's output, (N, C)."""

    mean: Tensor
    var: Tensor


OWN = len(Parameters._fields)


class Static(NamedTuple):
    spec: Spec
    units: Sequence[Unit]
    slab_elements: int | None


def level(
    x: Deferred, units: Sequence[Unit], parameters: Sequence[Parameters], slab_elements: int | None = None
) -> tuple[Deferred, list[Statistics]]:
    """The level's value, stored, and the statistics of its three convolutions, without a gradient; the first
    may have a stride. Not for torch.compile.

    Kept for backward: the expression's tensors, parameters, statistics (tiny). The gradient of the output is
    overwritten: this package's operators, which read it, made it for it alone.
    """
    static = Static(x.spec, units, slab_elements)
    own = (t for unit in parameters for t in unit)
    out, *flat = _operator(x.device, x.dtype, static, (*x.tensors, *own))
    return plain(out, x.dtype, made_by(x.spec, units[0].window)), _pairs(flat)


def _pairs(flat: Sequence[Tensor]) -> list[Statistics]:
    return [Statistics(*flat[i : i + 2]) for i in range(0, 2 * UNITS, 2)]


def _forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """out, and the statistics of the three convolutions."""
    x, parameters = _sorted(static.spec, tensors)
    out, statistics = level_forward(ops, x, static.units, parameters, static.slab_elements)
    return (out, *(t for found in statistics for t in found)), ()


def _backward(
    ops: Algorithm,
    static: Static,
    own: Sequence[Tensor],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    x, parameters = _sorted(static.spec, tensors)
    inner = len(x.tensors)
    found, own_grads = level_backward(
        ops, x, needed[:inner], static.units, parameters, needed[inner::OWN], _pairs(own), grads[0],
        static.slab_elements,
    )  # fmt: skip
    return [*found, *(t for grads_of_unit in own_grads for t in grads_of_unit)]


def _sorted(spec: Spec, tensors: Sequence[Tensor]) -> tuple[Deferred, list[Parameters]]:
    own = tensors[-OWN * UNITS :]
    parameters = [Parameters(*own[i : i + OWN]) for i in range(0, len(own), OWN)]
    return Deferred(spec, tuple(tensors[: -OWN * UNITS])), parameters


_operator = Operator(
    "level", Static, _forward, _backward, outputs=1 + 2 * UNITS, constants=range(1, 1 + 2 * UNITS),
    own=lambda outputs, _: outputs[1:],
)  # fmt: skip


def level_forward(
    ops: Algorithm,
    x: Deferred,
    units: Sequence[Unit],
    parameters: Sequence[Parameters],
    slab_elements: int | None,
) -> tuple[Tensor, list[Statistics]]:
    """out, (N, C, D, H, W) in the expression's type, and the statistics of y0, y1 and y2."""
    outputs, norms, statistics, h = [], [], [], x
    for unit, own in zip(units, parameters, strict=True):
        y, mean, var = conv3d_forward(
            ops, h.spec, h.tensors, own.weight, None, unit.window, True, slab_elements
        )
        assert mean is not None
        assert var is not None
        statistics.append(Statistics(mean, var))
        outputs.append(y)
        norms.append(terms(unit.how, unit.running, mean, var, own.gamma, own.beta))
        h = raw(y, norms[-1], unit.slope, made_by(h.spec, unit.window))
    a0 = raw(outputs[0], norms[0], units[0].slope, h.shape[2])
    out = residual(a0, outputs[2], norms[2], units[2].slope)
    return materialise_forward(ops, out.spec, out.tensors, slab_elements), statistics


def level_backward(
    ops: Algorithm,
    x: Deferred,
    needed: Sequence[bool],
    units: Sequence[Unit],
    parameters: Sequence[Parameters],
    weights_needed: Sequence[bool],
    statistics: Sequence[Statistics],
    grad: Tensor,
    slab_elements: int | None,
) -> tuple[list[Tensor | None], list[ParametersGradients]]:
    """Gradients of the expression's tensors and of the parameters (None of weights where not needed). grad:
    that of out, whose memory is used up."""
    norms = [
        NormBackward(unit.how, unit.running, *found, own.gamma, own.beta)
        for unit, found, own in zip(units, statistics, parameters, strict=True)
    ]
    y0, y1, y2 = _again(ops, x, units, parameters, norms, slab_elements)
    d = made_by(x.spec, units[0].window)
    a0, a1 = raw(y0, norms[0].terms, units[0].slope, d), raw(y1, norms[1].terms, units[1].slope, d)

    def convolution(
        i: int, h: Deferred, y: Tensor, mean: Tensor | None, grad_y: Tensor, from_norm: FromNorm
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        wanted = needed if i == 0 else [True] * len(h.tensors)
        grad_weight, _, grads = conv3d_backward(
            ops, h.spec, h.tensors, wanted, parameters[i].weight, units[i].window, y, mean, grad_y,
            *from_norm, weights_needed[i], False, slab_elements, consumes=True,
        )  # fmt: skip
        return grad_weight, grads

    through_norm = _sum_backward(ops, a0, y2, norms[2].terms, units[2].slope, grad, slab_elements)
    z2 = raw(y2, norms[2].terms, 1.0, d)
    _into_place(ops, z2, grad, statistics[2].mean, norms[2](through_norm), slab_elements)
    del z2
    grad_weight2, grads = convolution(2, a1, y2, None, y2, (None, None))
    del y2
    grad_y1, through_norm = _of_raw(grads)
    grad_weight1, grads = convolution(1, a0, y1, statistics[1].mean, grad_y1, norms[1](through_norm))
    del y1, a1, grad_y1
    grad_y0, through_norm = _of_raw(grads)
    every = [True] * len(a0.tensors)
    also_y0, also = _of_raw(
        materialise_backward(ops, a0.spec, a0.tensors, every, grad, slab_elements, memory=grad)
    )
    del grad
    grad_y0.add_(also_y0)
    del also_y0
    both = Normalisation(*(a + b for a, b in zip(through_norm, also, strict=True)))
    grad_weight0, grads = convolution(0, x, y0, statistics[0].mean, grad_y0, norms[0](both))
    own = zip((grad_weight0, grad_weight1, grad_weight2), norms, strict=True)
    return grads, [ParametersGradients(weight, norm.grad_gamma, norm.grad_beta) for weight, norm in own]


def _of_raw(grads: Sequence[Tensor | None]) -> tuple[Tensor, Normalisation]:
    """Of a raw output, and of the terms that normalise it."""
    y, *norm = (g for g in grads if g is not None)
    return y, Normalisation(*norm)


def _again(
    ops: Algorithm,
    x: Deferred,
    units: Sequence[Unit],
    parameters: Sequence[Parameters],
    norms: Sequence[NormBackward],
    slab_elements: int | None,
) -> list[Tensor]:
    outputs, h = [], x
    for unit, own, norm in zip(units, parameters, norms, strict=True):
        y, _, _ = conv3d_forward(ops, h.spec, h.tensors, own.weight, None, unit.window, False, slab_elements)
        outputs.append(y)
        h = raw(y, norm.terms, unit.slope, made_by(h.spec, unit.window))
    return outputs


def _sum_backward(
    ops: Algorithm,
    a0: Deferred,
    y2: Tensor,
    norm: Normalisation,
    slope: float,
    grad: Tensor,
    slab_elements: int | None,
) -> Normalisation:
    """Turns the gradient of act(a0 + norm(y2)) into that of the sum, in place; the gradients of the norm."""
    grad_scale, grad_beta = torch.zeros_like(norm.scale), torch.zeros_like(norm.scale)
    per_slab = thickness(a0.spec, slab_elements, a0.device)
    stored = readable(a0.spec, a0.tensors, None, per_slab)
    for slab in _slabs(a0, slab_elements):
        one = slab.one
        mean, scale, beta = (t[one] for t in norm)
        part, own = y2[one, :, slab.here], grad[one, :, slab.here]
        with torch.no_grad():
            addend = rows(ops, a0.spec, stored, slab.sample, slab.lo, slab.hi)
            value = ops.norm_act(part, mean, scale, beta, slope, addend=addend)
        found = ops.norm_act_backward(own, part, value, mean, scale, slope, need_dz=True, need_terms=True)
        assert found.dz is not None
        assert found.dscale is not None
        assert found.dbeta is not None
        own.copy_(found.dz)
        grad_scale[one] += found.dscale
        grad_beta[one] += found.dbeta
    return Normalisation(-norm.scale * grad_beta, grad_scale, grad_beta)


def _into_place(
    ops: Algorithm,
    z: Deferred,
    grad: Tensor,
    own_mean: Tensor,
    grads: tuple[Tensor | None, Tensor | None],
    slab_elements: int | None,
) -> None:
    """Puts the gradient of y where y was. z: norm(y); grad: of z; grads: of y's statistics."""
    y, *norm = z.tensors
    folded = through_statistics(z.shape, own_mean, *grads)
    for slab in _slabs(z, slab_elements):
        one, sample = slab.one, slab.sample
        part, own = y[one, :, slab.here], grad[one, :, slab.here]
        mean, scale = norm[0][one], norm[1][one]
        direct = ops.norm_act_backward(own, part, part, mean, scale, 1.0, need_dy=True).dy
        assert direct is not None
        part.copy_(direct if folded is None else ops.fold(direct, part, *(t[sample] for t in folded)))


def _slabs(x: Deferred, slab_elements: int | None) -> Iterator[Slab]:
    return slabs(x.shape[0], x.shape[2], thickness(x.spec, slab_elements, x.device))
