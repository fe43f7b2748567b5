"""What a channel's numbers mean: Hounsfield units in a window, or values known by their statistics alone."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from effseg.errors import InputError

Window = tuple[float, float]  # HU
# What is made of a channel: a window; None, mean and deviation become 0 and 1; or one of nnU-Net's schemes.
Scaling = Window | None | str
NO_NORM, FROM_0_TO_1, RGB = SCHEMES = ("noNorm", "rescale_to_0_1", "rgb_to_0_1")

PADDING = -1100.0  # what is below fills what no detector saw
AIR_OR_FAT = -50.0  # HU: in every patient there is some
SCARCE = 1e-4  # of the voxels: less air and fat than in any scan of a patient
LARGEST = 1e15  # the square of a sum of such values is a float32
_SAMPLE = 1 << 21


def scaling(name: str, window: Window) -> Scaling:
    """What nnU-Net makes of a channel of this name in dataset.json: CT gets the `window`."""
    name = name.strip().casefold()
    if name == "ct":
        return window
    return next((scheme for scheme in SCHEMES if scheme.casefold() == name), None)


def parse_window(window: Any) -> Window | tuple[Scaling, ...]:
    """(low, high), or such a pair, None or one of `SCHEMES` for each channel, from any sequences.

    Raises InputError for windows that are empty or not finite, TypeError or ValueError for anything else.
    """
    if is_window(window):
        low, high = map(float, window)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InputError(f"window: expected two HU values, the lower first, got {low:g} and {high:g}")
        return low, high
    windows = tuple(window)
    if not windows or not all(one is None or one in SCHEMES or is_window(one) for one in windows):
        raise InputError(f"window: expected two HU values, or two for each channel, got {window}")
    parsed = (one if one is None or isinstance(one, str) else parse_window(one) for one in windows)
    return tuple(parsed)  # type: ignore[arg-type]


def is_window(window: Any) -> bool:
    """Whether it is one pair of limits."""
    return len(window) == 2 and all(isinstance(limit, int | float | np.number) for limit in window)


def scaled(image: np.ndarray, scalings: Sequence[Scaling]) -> np.ndarray:
    """A float32 copy of `image` (C, X, Y, Z), its channels scaled but for those that have a window.

    Raises InputError for values that are no RGB, or above `LARGEST` without a window that would cut them off:
    one of them, as converters write where there is no data, would make a whole volume equal or not finite.
    """
    for channel, how in zip(image, scalings, strict=True):
        low, high = float(channel.min()), float(channel.max())
        if not isinstance(how, tuple) and max(-low, high) > LARGEST:
            extreme = low if -low > high else high
            raise InputError(f"expected intensities from {-LARGEST:g} to {LARGEST:g}, found {extreme:g}")
    image = image.astype(np.float32)
    for channel, how in zip(image, scalings, strict=True):
        low, high = float(channel.min()), float(channel.max())
        if how is None:
            mean, deviation = foreground_statistics(channel)
            channel -= mean
            channel /= deviation
        elif how == FROM_0_TO_1:
            channel -= low
            channel /= max(high - low, 1e-8)
        elif how == RGB:
            if low < 0 or high > 255:
                raise InputError(f"{RGB}: expected values from 0 to 255, found {low:g} to {high:g}")
            channel /= 255
    return image


def drawn(how: Scaling, values: np.ndarray) -> Window:
    """What is drawn black and white of a channel's `values`, scaled as `how` says but for a window."""
    if how is None:
        return -2.0, 2.0  # standard deviations
    if how == NO_NORM:
        low = float(values.min())
        return low, max(float(values.max()), low + 1e-8)
    return (0.0, 1.0) if isinstance(how, str) else how


def no_hu(channel: np.ndarray) -> str | None:
    """Why the values of a CT, (X, Y, Z), cannot be Hounsfield units; None where they can.

    Every scan of a patient has air (-1000 HU) or fat (-100 HU) in it. Padding below -1100 is left aside.
    """
    step = max(1, round((channel.size / _SAMPLE) ** (1 / 3)))
    sample = channel[::step, ::step, ::step]
    sample = sample[sample >= PADDING]
    if not sample.size or np.mean(sample < AIR_OR_FAT) >= SCARCE:
        return None
    lowest, highest = float(channel[channel >= PADDING].min()), float(channel.max())
    lies = f"the values lie from {lowest:g} to {highest:g}"
    if highest - lowest <= 10:
        return f"{lies}, as if they had been scaled"
    if lowest >= 0 and highest <= 255:
        return f"{lies}, as grey values of 8 bits do"
    values, counts = np.unique(np.rint(sample), return_counts=True)
    mode = float(values[counts.argmax()])
    if 0 <= mode <= 24:
        return f"{lies}, most at {mode:g}, as if 1024 had not been subtracted"
    return f"{lies}, nothing is air or fat"


def foreground_statistics(channel: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the voxels (X, Y, Z) that are not 0; (0, 1) where there are none.

    nnU-Net's z-score, in which 0 is what was masked.
    """
    count, total, squares = 0, 0.0, 0.0
    for plane in channel:
        values = plane[plane != 0].astype(np.float64)
        count, total = count + values.size, total + values.sum()
    if count == 0:
        return 0.0, 1.0
    mean = total / count
    for plane in channel:
        squares += np.square(plane[plane != 0].astype(np.float64) - mean).sum()
    return mean, max(float(np.sqrt(squares / count)), 1e-8)


def listed(scalings: Sequence[Scaling]) -> str:
    """What is made of the channels, for people: "-200 to 400 HU, standardised"."""
    return ", ".join(
        how or "standardised" if how is None or isinstance(how, str) else f"{how[0]:g} to {how[1]:g} HU"
        for how in scalings
    )
