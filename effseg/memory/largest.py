"""The largest volume whose training step fits."""

from collections.abc import Callable
from math import prod

from effseg.errors import InputError
from effseg.memory.report import MemoryReport

STEP = 8  # voxels: how finely the largest sizes are told

Volume = tuple[int, int, int]


def largest(
    predict: Callable[[Volume], MemoryReport],
    known: MemoryReport,
    usable: int,
    volume: Callable[[int], Volume],
) -> int:
    """The largest multiple of STEP whose volume fits, 0 where none does; known: the step at some volume.

    Every size that is said to fit was predicted itself. A peak is a fixed part plus bytes per voxel that
    hardly change with the size, so a guess is nearly right at once; it moves until a size fits and the next
    larger one is expected not to.
    """
    batch = known.shape[0]
    fixed = known.split["parameters"] + known.split["optimizer"]
    per_voxel = (known.peak - fixed) / known.voxels
    fitting, too_large = 0, None
    while True:
        size = _last(lambda s: fixed + per_voxel * batch * prod(volume(s)) <= usable)  # noqa: B023
        size = size if too_large is None else min(size, too_large - STEP)
        if size <= fitting:
            return fitting
        try:
            report = predict(volume(size))
        except InputError:  # the network was fine with another volume, so this one is too small for it
            return fitting
        per_voxel = (report.peak - fixed) / report.voxels
        if report.peak <= usable:
            fitting = size
        else:
            too_large = size


def _last(fits: Callable[[int], bool]) -> int:
    """The last multiple of STEP that fits, where all before it do."""
    low, high = 0, 1
    while fits(high * STEP):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP
