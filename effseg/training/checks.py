"""Whether a run can go on as it began, and its network learn from its data, before the first step."""

import math

from torch import nn

from effseg.errors import InputError
from effseg.models.base import SegmentationModel
from effseg.training.config import TrainingConfig
from effseg.training.data import TrainingData
from effseg.training.runs import ANEW
from effseg.training.sampling import Sampler


def check_batch_norm(model: SegmentationModel, data: TrainingData, config: TrainingConfig) -> None:
    """Raise InputError where batch norm would get the statistics of one voxel: a process takes those of its
    own cases, and a small one may have no more on the network's lowest level."""
    if config.batch_size > 1 or not _has_batch_norm(model):
        return
    for case in data.training:
        d, h, w = config.patch_size or case.image.shape[1:]
        lowest = model.lowest_level((d, h, w))
        if lowest is None or math.prod(lowest) > 1:
            continue
        named, what, larger = "norm", f"case {case.name}, {d}x{h}x{w} voxels", "volumes"
        if config.patch_size is not None:
            named, what, larger = "patch_size", f"patches of {d}x{h}x{w} voxels", "patches"
        other = ", or norm instance or group" if config.model.startswith("effseg") else ""
        raise InputError(
            f"{named}: expected more than one voxel at the lowest level of {model.name}, which has batch "
            f"norm, got 1 of {what}: use larger {larger}{other}"
        )


def check_global_batch(
    recorded: int | None, before: TrainingConfig, now: TrainingConfig, sampler: Sampler, model: nn.Module
) -> None:
    """Raise InputError unless a step goes on with as many cases as the run's steps had: which cases it sees,
    at which rate, and how many steps there are, follows from that number and the step's.

    recorded: that number, None for a run of a version that did not record it. before: the run's
    configuration; sampler: that of now. Another number of processes may share the cases, unless batch norm
    takes the statistics of those of one process.
    """
    if recorded is None:
        if now.batch_size != before.batch_size:
            raise InputError(
                f"{now.output} holds a run with batch_size = {before.batch_size}, but now it is "
                f"{now.batch_size}: {ANEW}"
            )
        return
    may_change = not _has_batch_norm(model)
    if sampler.global_batch == recorded and (may_change or now.batch_size == before.batch_size):
        return
    groups, kind = sampler.world_size, "volumes" if now.patch_size is None else "patches"
    ways = [_batches(recorded // before.batch_size * now.split_volume, before.batch_size)]
    if may_change and recorded % groups == 0:
        ways.append(_batches(groups * now.split_volume, recorded // groups))
    told = " or ".join(dict.fromkeys(ways))
    raise InputError(
        f"{now.output} holds a run of {recorded} {kind} a step (batch_size {before.batch_size}), but now it "
        f"is {sampler.global_batch} (batch_size {now.batch_size}): go on with {told}, or {ANEW}"
    )


def _batches(processes: int, batch_size: int) -> str:
    return f"{processes} process{'' if processes == 1 else 'es'} of batch_size {batch_size}"


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm3d) for module in model.modules())
