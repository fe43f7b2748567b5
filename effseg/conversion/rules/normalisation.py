"""Instance, batch and group normalisation."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effseg import operators
from effseg.conversion import watch
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.outputs import convolve
from effseg.conversion.rules.registry import IDENTITY, rule, unfinished
from effseg.conversion.streamed import Layer, Summed, is_last, makes_again
from effseg.conversion.values import Convolution, Value, stored_as
from effseg.expressions.base import Deferred, Normalisation
from effseg.expressions.layers import UpAdd, convolved, plain, raw
from effseg.expressions.normed import normed
from effseg.operators.normalisation import (
    Merging,
    check_spread,
    layer_terms,
    moving_alone,
    update_running,
)


@rule(F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    running = _running(running_mean, running_var)
    return _normalised(input, Merging(eps), running, not use_input_stats, momentum, weight, bias)


@rule(torch.instance_norm)
def torchs_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """Of another order."""
    return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@rule(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    how = Merging(eps, samples=True)
    running = _running(running_mean, running_var)
    return _normalised(input, how, running, not training, momentum, weight, bias)


@rule(torch.batch_norm)
def torchs_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """Of another order."""
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@rule(torch.group_norm, F.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
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
    """The raw output of a convolution, stored, or any other tensor, stored; normalised where it is used. In
    `stream` less is stored: see `effseg.conversion.streamed`.

    A convolution's bias moves y by as much as the mean, and is left to the three numbers per channel. Raises
    InputError for a batch norm of one voxel, as torch does (a ValueError).
    """
    if not isinstance(input, LazyTensor) or (uses_running and running is None):
        return NotImplemented
    if not uses_running:
        check_spread(how, input.shape[0], prod(input.shape[2:]), running is not None)
        if _values(how, input.shape) == 1:
            return NotImplemented  # functional's norms refuse that, and torch's own do not
    value = unfinished(input)
    found = _measured(input, value)
    moved = found.mean if found.offset is None else found.mean + found.offset.to(found.mean.dtype)
    if running is not None and not uses_running:
        update_running(running, moved, found.var, prod(input.shape[2:]), momentum, how.samples)
    used = running if uses_running else None
    if found.normalised is None:
        assert isinstance(value, Convolution | Summed)
        return LazyTensor(_last(value, how, used, weight, bias, found))
    norm = layer_terms(how, used, found.mean, found.var, weight, bias, found.offset)
    return LazyTensor(found.normalised(norm))


def _values(how: Merging, shape: torch.Size) -> int:
    """Of how many a statistic is."""
    samples, channels, *size = shape
    each = prod(size) * (samples if how.samples else 1)
    return each if how.groups is None else each * (channels // how.groups)


class _Measured(NamedTuple):
    """What is to be normalised: its mean and variance but for a convolution's bias, and how it is; None where
    the loss does that."""

    mean: Tensor
    var: Tensor
    offset: Tensor | None
    normalised: Callable[[Normalisation], Deferred] | None


def _measured(input: LazyTensor, value: Value) -> _Measured:
    if isinstance(value, Convolution | Summed):
        watch.took("normalisation after convolution")
        with input.surroundings():
            if input.records and is_last(value.weight, value.window):
                input.taken()
                addend = value.addend if isinstance(value, Summed) else None
                mean, var = operators.layer_statistics(value.x, value.weight, value.window, addend=addend)
                return _Measured(mean, var, value.bias, None)
            if isinstance(value, Convolution):
                return _of_convolution(input, value)
    watch.took("normalisation")
    if isinstance(value, Deferred) and isinstance(value.spec, UpAdd) and makes_again():
        x = input.deferred(value.dtype)
        return _Measured(*operators.statistics(x), None, lambda norm: normed(x, norm, IDENTITY))
    y, rows = input.stored(), value.shape[2]
    x = plain(y, rows=rows)
    return _Measured(*operators.statistics(x), None, lambda norm: raw(y, norm, IDENTITY, rows))


def _of_convolution(input: LazyTensor, value: Convolution) -> _Measured:
    x, weight, offset, window = value
    if value.reads_image:
        input.taken()
        mean, var = operators.stem_statistics(x, weight, window)
        input.settle(value.deferred())
        return _Measured(mean, var, offset, lambda norm: convolved(x, weight, window, norm, IDENTITY))
    y, found, spread = convolve(x, weight, None, window, statistics=True)
    assert found is not None
    assert spread is not None
    rows = value.shape[2]
    # For other readers.
    input.settle(
        stored_as(y, rows) if offset is None else raw(y, moving_alone(offset, found), IDENTITY, rows)
    )
    return _Measured(found, spread, offset, lambda norm: raw(y, norm, IDENTITY, rows))


def _last(
    value: Convolution | Summed,
    how: Merging,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    found: _Measured,
) -> Layer:
    addend = value.addend if isinstance(value, Summed) else None
    as_now = None if running is None else (running[0].clone(), running[1].clone())
    return Layer(
        operators.Tail(
            value.x, value.weight, value.window, IDENTITY, how, as_now, weight, bias, found.offset, addend,
            (found.mean, found.var),
        )
    )  # fmt: skip
