"""A level of an encoder that keeps its output alone, and runs again in backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.sweeps.level import (
    UNITS,
    Parameters,
    Statistics,
    Unit,
    level_backward,
    level_forward,
)
from effseg.common.settings import Function
from effseg.expressions.layers import Deferred, plain
from effseg.expressions.slabs import Window
from effseg.operators.backward import backward as node_backward
from effseg.operators.normalisation import merging, track

if TYPE_CHECKING:
    from effseg.modules import ConvNormAct3d

OWN = 3  # tensors of a unit: weight, gamma, beta


class LevelFunction(Function):
    """out = the level's value. Saved for backward: the expression's tensors, parameters, statistics (tiny).

    The gradient of out is overwritten: this package's operators, which read out, made it for out alone.
    """

    @staticmethod
    def forward(ctx: Any, spec, units, norms, slab_elements, *tensors) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.device_type, ctx.spec = tensors[0].device.type, spec
        ctx.units, ctx.slab_elements = units, slab_elements
        x, parameters = _sorted(spec, tensors)
        ops = select(tensors[0].device, spec.dtype)
        out, statistics = level_forward(ops, x, units, parameters, slab_elements)
        voxels = out[0, 0].numel()  # of every unit's output
        for norm, found in zip(norms, statistics, strict=True):
            track(norm, *found, voxels)
        ctx.save_for_backward(*tensors, *(t for found in statistics for t in found))
        return out

    @staticmethod
    @node_backward
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        tensors, flat = ctx.saved_tensors[: -2 * UNITS], ctx.saved_tensors[-2 * UNITS :]
        statistics = [Statistics(*flat[i : i + 2]) for i in range(0, 2 * UNITS, 2)]
        x, parameters = _sorted(ctx.spec, tensors)
        needed = ctx.needs_input_grad[4:]
        inner = len(x.tensors)
        grads, own = level_backward(
            select(grad.device, ctx.spec.dtype), x, needed[:inner], ctx.units, parameters,
            needed[inner::OWN], statistics, grad, ctx.slab_elements,
        )  # fmt: skip
        return None, None, None, None, *grads, *(t for found in own for t in found)


def _sorted(spec: Any, tensors: Sequence[Tensor]) -> tuple[Deferred, list[Parameters]]:
    own = tensors[-OWN * UNITS :]
    parameters = [Parameters(*own[i : i + OWN]) for i in range(0, len(own), OWN)]
    return Deferred(spec, tuple(tensors[: -OWN * UNITS])), parameters


def level(
    x: Deferred, units: Sequence[ConvNormAct3d], slope: float, slab_elements: int | None = None
) -> Deferred:
    """act(a + norm(conv(unit(a)))) with a = unit(x), of three units without bias, the last one's activation
    with this slope; the first may have a stride. Not for torch.compile."""
    slopes = (units[0].negative_slope, units[1].negative_slope, slope)
    described = [
        Unit(Window(*_axes(unit)), *merging(unit.norm), own_slope)
        for unit, own_slope in zip(units, slopes, strict=True)
    ]
    own = [t for unit in units for t in (unit.conv.weight, unit.norm.weight, unit.norm.bias)]
    with torch.autocast(x.device.type, enabled=False):
        value = LevelFunction.apply(
            x.spec, described, [unit.norm for unit in units], slab_elements, *x.tensors, *own
        )
    return plain(value, x.dtype)


def _axes(unit: ConvNormAct3d) -> tuple[Any, Any]:
    return unit.conv.kernel_size, unit.conv.stride
