"""Confidence intervals of means over patients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from effseg.errors import InputError

LEVEL = 0.95
DICE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)
"""Where a mean can lie."""


class Estimate(NamedTuple):
    """A mean and its interval; NaN for the ends that one patient does not tell."""

    mean: float
    low: float
    high: float

    def text(self, sign: str = "") -> str:
        """As in "0.853 (0.841 to 0.862)"; sign: "+" to write it."""
        if math.isnan(self.low):
            return f"{self.mean:{sign}.3f} (one patient)"
        return f"{self.mean:{sign}.3f} ({self.low:{sign}.3f} to {self.high:{sign}.3f})"


def mean_over_patients(
    values: Sequence[float] | np.ndarray, within: tuple[float, float] = DICE, level: float = LEVEL
) -> Estimate:
    """The mean of one value a patient, (P,), and Student's interval, cut to where the mean can lie. For two
    contenders on the same patients: of their differences, which pairs them.

    Percentiles of bootstrapped means would hold the true mean too seldom: for four patients in 8 of 10
    cases, for sixteen in 92 of 100, where 95 are promised.

    Raises InputError for no patients, or a value that is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError(f"values: expected one finite number a patient, got {values}")
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    deviation = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * deviation
    return Estimate(mean, max(within[0], mean - half), min(within[1], mean + half))
