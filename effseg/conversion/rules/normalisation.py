"""Instance, batch and group normalisation."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effseg import operators
from effseg.conversion import watch
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.outputs import convolve
from effseg.conversion.rules.registry import IDENTITY, rule
from effseg.conversion.values import Convolution, stored_as
from effseg.expressions.base import Deferred, Normalisation
from effseg.expressions.layers import raw
from effseg.operators.normalisation import Merging, terms, update_running


@rule(torch.instance_norm, F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    running = _running(running_mean, running_var)
    return _normalised(input, Merging(eps), running, not use_input_stats, momentum, weight, bias)


@rule(torch.batch_norm, F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    how = Merging(eps, samples=True)
    running = _running(running_mean, running_var)
    return _normalised(input, how, running, not training, momentum, weight, bias)


@rule(torch.group_norm, F.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if not isinstance(input, LazyTensor) or input.shape[1] % num_groups:
        return NotImplemented
    return _normalised(input, Merging(eps, groups=num_groups), None, False, 0.0, weight, bias)


def _running(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if mean is None or var is None else (mean, var)


def _normalised(
    input: Tensor,
    how: Merging,
    running: tuple[Tensor, Tensor] | None,
    uses_running: bool,
    momentum: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Any:
    """The raw output of a convolution, stored, or any other tensor, stored; normalised where it is used.

    A convolution's bias moves y by as much as the mean, and is left to the three numbers per channel.
    """
    if not isinstance(input, LazyTensor) or (uses_running and running is None):
        return NotImplemented
    value, offset = input.value, None
    if isinstance(value, Convolution):
        offset = value.bias
        with input.surroundings():
            y, mean, var = convolve(value.x, value.weight, None, value.window, statistics=True)
            assert mean is not None
            assert var is not None
            rows = input.shape[2]
            # Should something else read it.
            input.settle(stored_as(y, rows) if offset is None else _shifted(y, offset, mean, rows))
        watch.took("normalisation after convolution")
    else:
        y = input.stored()
        mean, var = operators.statistics(y, rows=value.shape[2])
        watch.took("normalisation")
    moved = mean if offset is None else mean + offset.to(mean.dtype)
    if running is not None and not uses_running:
        update_running(running, moved, var, math.prod(value.shape[2:]), momentum, how.samples)
    norm = terms(how, running if uses_running else None, moved, var, weight, bias)
    if offset is not None:
        norm = norm._replace(mean=norm.mean - offset.to(mean.dtype))
    if y.dtype != torch.float64:
        norm = Normalisation(*(t.float() for t in norm))
    return LazyTensor(raw(y, norm, IDENTITY, value.shape[2]))


def _shifted(y: Tensor, bias: Tensor, like: Tensor, rows: int) -> Deferred:
    """y + bias, not stored; rows: of the whole volume."""
    zero = torch.zeros_like(like)
    return raw(y, Normalisation(zero - bias.to(like.dtype), zero + 1, zero), IDENTITY, rows)
