"""Normalisation as three small tensors: (mean, scale, beta) per sample and channel, for any of torch's norms.

A convolution node gives mean and biased variance of its output per (n, c). Instance normalisation takes them
as they are; batch and group normalisation merge them over samples or over the channels of a group: the mean
of the means, and the mean of var + (mean - merged mean)^2. All of it is ordinary torch on a few numbers, so
autograd differentiates the normalisation.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effseg.common.settings import Setting
from effseg.errors import InputError
from effseg.expressions.base import Normalisation

Norm = nn.InstanceNorm3d | nn.BatchNorm3d | nn.GroupNorm
NORMS = ("instance", "batch", "group")

_frozen = Setting("effseg_frozen_running_statistics", False, lasting=False)


@dataclass(frozen=True)
class Merging:
    """What a norm does to the statistics of an (n, c) before it divides by them: it merges those of `groups`
    of channels, those of all `samples`, or neither."""

    eps: float
    groups: int | None = None
    samples: bool = False


Running = tuple[Tensor, Tensor] | None
"""Running mean and variance that take the place of a batch's, (C,) each."""


def merging(norm: Norm) -> tuple[Merging, Running]:
    """`norm`'s settings without its parameters, and the statistics that it uses instead of a batch's."""
    if isinstance(norm, nn.GroupNorm):
        return Merging(norm.eps, groups=norm.num_groups), None
    running = None
    if norm.running_mean is not None and norm.running_var is not None and not norm.training:
        running = norm.running_mean, norm.running_var
    return Merging(norm.eps, samples=isinstance(norm, nn.BatchNorm3d)), running


def make_norm(norm: str, channels: int) -> Norm:
    """Affine instance, batch or group normalisation (groups of 8 channels), torch's own modules."""
    if norm == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    if norm == "batch":
        return nn.BatchNorm3d(channels)
    if norm == "group":
        return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)
    raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")


def normalisation(norm: Norm, mean: Tensor, var: Tensor, voxels: int) -> Normalisation:
    """What `norm` does to values of mean and biased variance (N, C) over `voxels`; running statistics are
    updated in training and used in evaluation, as torch does. Instance norm of one voxel per channel, where
    torch raises, gives beta: whole volumes may be that small on the deepest level. Raises `InputError` where
    batch norm would take a batch's statistics of one value (`check_spread`), `TypeError` for other norms.
    """
    if type(norm) not in (nn.InstanceNorm3d, nn.BatchNorm3d, nn.GroupNorm):
        raise TypeError(f"norm: expected InstanceNorm3d, BatchNorm3d or GroupNorm, got {type(norm).__name__}")
    made = terms(*merging(norm), mean, var, norm.weight, norm.bias)
    track(norm, mean, var, voxels)
    return made


def terms(
    how: Merging, running: Running, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Normalisation:
    """(mean, scale, beta), each (N, C), of a norm with these settings, weight and bias.

    scale = weight / sqrt(var + eps), beta = bias.
    """
    if how.groups is not None:
        grouped = mean.unflatten(1, (how.groups, -1))
        centre = grouped.mean(2, keepdim=True)
        spread = (var.unflatten(1, (how.groups, -1)) + (grouped - centre).square()).mean(2, keepdim=True)
        mean, var = centre.expand_as(grouped).flatten(1), spread.expand_as(grouped).flatten(1)
    elif running is not None:
        mean, var = (t.to(mean.dtype).expand_as(mean) for t in running)
    elif how.samples:
        centre = mean.mean(0)
        mean, var = centre.expand_as(mean), (var + (mean - centre).square()).mean(0).expand_as(var)
    scale = torch.rsqrt(var + how.eps)
    return Normalisation(
        mean,
        scale if weight is None else scale * weight,
        torch.zeros_like(mean) if bias is None else bias.to(mean.dtype).expand_as(mean),
    )


def layer_terms(
    how: Merging,
    running: Running,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None = None,
) -> Normalisation:
    """`terms` of y + offset, for y of this mean and variance, in their type. offset: a convolution's bias,
    (C,), which moves y by as much as the mean and is left to the three numbers per channel."""
    if offset is None:
        norm = terms(how, running, mean, var, weight, bias)
    else:
        moved = offset.to(mean.dtype)
        norm = terms(how, running, mean + moved, var, weight, bias)
        norm = norm._replace(mean=norm.mean - moved)
    return Normalisation(*(t.to(mean.dtype) for t in norm))


def moving_alone(offset: Tensor | None, like: Tensor) -> Normalisation:
    """Terms of y + offset itself, of the shape and type of `like`."""
    zero = torch.zeros_like(like)
    return Normalisation(zero if offset is None else zero - offset.to(like.dtype), zero + 1, zero)


@torch.no_grad()
def track(norm: Norm, mean: Tensor, var: Tensor, voxels: int) -> None:
    """Update the running statistics of a norm in training as torch does. Raises as `check_spread` does."""
    if isinstance(norm, nn.GroupNorm):
        return
    tracked = norm.running_mean is not None and norm.running_var is not None
    if norm.training or not tracked:
        check_spread(merging(norm)[0], mean.shape[0], voxels, tracked)
    if norm.running_mean is None or norm.running_var is None:
        return
    if not norm.training or _frozen.get():
        return
    momentum: float | Tensor = norm.momentum or 0.0
    samples = isinstance(norm, nn.BatchNorm3d)
    if samples:
        # torch's instance normalisation neither counts nor averages evenly
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    update_running((norm.running_mean, norm.running_var), mean, var, voxels, momentum, samples)


def check_spread(how: Merging, samples: int, voxels: int, tracked: bool) -> None:
    """Raise InputError where the statistics of a batch are those of a single value a channel, and batch norm
    takes them or running ones take them in (tracked).

    Their variance is 0: a layer gives beta in training, whatever it reads, and divides by sqrt(eps) in
    evaluation, so that a network is worth nothing.
    """
    alone = voxels == 1 and (samples == 1 or not how.samples)
    if alone and (how.samples or tracked):
        kind = "batch norm" if how.samples else "a norm with running statistics"
        raise InputError(
            f"norm: expected more than one voxel per channel where {kind} is trained, got 1: use larger "
            f"images{' or more of them' if how.samples else ''}, or another norm"
        )


@torch.no_grad()
def update_running(
    running: tuple[Tensor, Tensor],
    mean: Tensor,
    var: Tensor,
    voxels: int,
    momentum: float | Tensor,
    samples: bool,
) -> None:
    """Move running mean and variance (C,) towards those of a batch, (N, C) and biased, over `voxels` each;
    the running variance is the unbiased one. samples: of all samples together, as in batch norm."""
    if _frozen.get():
        return
    if samples:
        var = var + (mean - mean.mean(0)).square()
        voxels *= mean.shape[0]
    unbiased = var.mean(0) * (voxels / max(1, voxels - 1))
    for statistic, found in zip(running, (mean.mean(0), unbiased), strict=True):
        statistic.lerp_(found.to(statistic.dtype), momentum)


def frozen_running_statistics() -> AbstractContextManager[None]:
    """A forward pass that is run again, for recomputation, must not be tracked twice."""
    return _frozen.set(True)
