"""Confidence intervals of means over patients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from effseg.errors import InputError

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95


class Estimate(NamedTuple):
    """A mean and its interval."""

    mean: float
    low: float
    high: float

    def text(self, sign: str = "") -> str:
        """As in "0.853 (0.841 to 0.862)"; sign: "+" to write it."""
        return f"{self.mean:{sign}.3f} ({self.low:{sign}.3f} to {self.high:{sign}.3f})"


def mean_over_patients(values: np.ndarray, level: float = LEVEL) -> Estimate:
    """The mean of one value a patient, (P,), and the interval between two percentiles of the means of
    `RESAMPLES` draws of P patients with replacement. For two contenders on the same patients: of their
    differences, which pairs them. The draws are the same every time.

    Raises InputError for no patients, or a value that is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError(f"values: expected one finite number a patient, got {values}")
    drawn = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high))
