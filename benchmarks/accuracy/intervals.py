"""Confidence intervals of means over patients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from effseg.errors import InputError

LEVEL, RESAMPLES, SEED = 0.95, 10_000, 0
DICE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)
"""Where a mean can lie."""


class Estimate(NamedTuple):
    """A mean and its interval; NaN for the ends that one patient does not tell."""

    mean: float
    low: float
    high: float

    def text(self, sign: str = "") -> str:
        """As in "0.853 (0.841 to 0.862)"; sign: "+" to write it."""
        return f"{self.mean:{sign}.3f} ({self.interval(sign)})"

    def interval(self, sign: str = "") -> str:
        """As in "0.841 to 0.862"."""
        return "one patient" if math.isnan(self.low) else f"{self.low:{sign}.3f} to {self.high:{sign}.3f}"


def mean_over_patients(
    values: Sequence[float] | np.ndarray, within: tuple[float, float] = DICE, level: float = LEVEL
) -> Estimate:
    """The mean of one value a patient, (P,), and Student's interval, cut to where the mean can lie. For two
    contenders on the same patients: of their differences, which pairs them.

    Raises InputError for no patients, or a value that is not finite.
    """
    values = _checked(values)
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    deviation = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * deviation
    return Estimate(mean, max(within[0], mean - half), min(within[1], mean + half))


def bootstrapped(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Estimate:
    """The mean as in `mean_over_patients`, and the interval between two percentiles of the means of
    `RESAMPLES` draws of P patients with replacement, the same draws every time.

    It holds the true mean too seldom where patients are few: for four in 8 of 10 cases, for sixteen in 92 of
    100, where 95 are promised.
    """
    values = _checked(values)
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Estimate(mean, math.nan, math.nan)
    drawn = np.random.default_rng(SEED).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile(values[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high))


def _checked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise InputError(f"values: expected one finite number a patient, got {found}")
    return found
