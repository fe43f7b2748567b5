"""The largest volume whose training step fits."""

from collections.abc import Callable
from math import prod

from effseg.errors import InputError
from effseg.memory.report import MemoryReport

STEP = 8  # voxels: how finely the largest sizes are told
BEYOND = 1.05  # of what fits; nearby predictions are closer to a line than this

Volume = tuple[int, int, int]


def largest(
    predict: Callable[[Volume], MemoryReport],
    known: MemoryReport,
    usable: int,
    volume: Callable[[int], Volume],
    other: MemoryReport | None = None,
) -> int:
    """The largest multiple of STEP whose volume fits, 0 where none does; known, other: the step at some
    volumes.

    It was predicted itself, and so was the next size, which does not fit, but where it is BEYOND what fits by
    a straight line through two predictions. What is reserved is a fixed part plus bytes per voxel that hardly
    change with the size, so guesses along such lines close in at once.
    """
    batch = known.shape[0]
    fixed = float(known.split["parameters"] + known.split["optimizer"])
    slope = (known.reserved - fixed) / known.voxels
    if other is not None and other.voxels > known.voxels and other.reserved > known.reserved:
        slope = (other.reserved - known.reserved) / (other.voxels - known.voxels)
        fixed = known.reserved - slope * known.voxels
    last = known
    fitting, too_large = 0, 0
    while too_large != fitting + STEP:
        size = max(_last(lambda s: fixed + slope * batch * prod(volume(s)) <= usable), fitting + STEP)  # noqa: B023
        size = min(size, too_large - STEP) if too_large else size
        try:
            report = predict(volume(size))
        except InputError:  # the network was fine with another volume, so this one is too small for it
            return fitting
        if report.reserved <= usable:
            fitting = size
        else:
            too_large = size
        if report.voxels != last.voxels:
            # Where small volumes' needs hardly grow, larger ones' do.
            least = report.reserved / report.voxels / 4
            slope = max((report.reserved - last.reserved) / (report.voxels - last.voxels), least)
        fixed, last = report.reserved - slope * report.voxels, report
        if size == fitting and fixed + slope * batch * prod(volume(size + STEP)) > BEYOND * usable:
            return fitting
    return fitting


def _last(fits: Callable[[int], bool]) -> int:
    """The last multiple of STEP that fits, where all before it do."""
    low, high = 0, 1
    while fits(high * STEP):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP
