"""What a channel's numbers mean: Hounsfield units in a window, or values known by their statistics alone."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effseg.errors import InputError

PADDING = -1100.0  # what is below fills what no detector saw
AIR_OR_FAT = -50.0  # HU: in every patient there is some
SCARCE = 1e-4  # of the voxels: less air and fat than in any scan of a patient
_SAMPLE = 1 << 21


def channel_names(folder: str | Path) -> tuple[str, ...] | None:
    """The names of the channels in a data set's dataset.json (`channel_names`, or `modality`), or None.

    Raises InputError where they are not numbered 0, 1, ...
    """
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    names = entries.get("channel_names", entries.get("modality")) if isinstance(entries, dict) else None
    if names is None:
        return None
    try:
        return tuple(str(names[str(index)]) for index in range(len(names)))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: expected channel_names as {{'0': 'CT', ...}}, found {names}") from error


def is_ct(name: str) -> bool:
    """Whether nnU-Net takes a channel of this name for CT."""
    return name.strip().lower() == "ct"


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


def listed(windows: Sequence[tuple[float, float] | None]) -> str:
    """What is made of the channels, for people: "-200 to 400 HU, standardised"."""
    return ", ".join(
        "standardised" if window is None else f"{window[0]:g} to {window[1]:g} HU" for window in windows
    )
