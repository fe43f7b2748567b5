"""Dice of the validation cases while training, on the scans' own grids, as `effseg evaluate` scores files."""

from collections.abc import Callable, Sequence

import numpy as np

from effseg.data.cache import WholeCase
from effseg.evaluation.folders import dice_per_class
from effseg.training.distributed import World


def validate(
    cases: Sequence[WholeCase],
    segment: Callable[[WholeCase], np.ndarray],
    num_classes: int,
    ignore: int | None,
    world: World,
    look: Callable[[WholeCase, np.ndarray], None],
) -> list[float]:
    """Mean Dice of every organ over `cases`, NaN for an organ that is in no case; the same on all processes.

    segment: a case -> its classes (X, Y, Z) on the scan's grid. Organs outside of the crop count as missed.
    ignore: class whose voxels do not count.
    look: is shown the first case's segmentation. Every process of `world` segments its share of the cases.
    """
    mine: list[np.ndarray] = []
    for case in world.share(list(cases)):
        prediction = segment(case)
        mine.append(dice_per_class(prediction, np.asarray(case.labels), num_classes, ignore)[1:])
        if case is cases[0]:
            look(case, prediction)
    every: list[np.ndarray] = world.gather(mine)
    return mean_over_cases(np.stack(every))


def mean_over_cases(dice: np.ndarray) -> list[float]:
    """(cases, organs) -> organs, over the cases in which an organ is."""
    present = ~np.isnan(dice)
    sums, counts = np.where(present, dice, 0.0).sum(0), present.sum(0)
    means = np.full(len(counts), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means.tolist()
