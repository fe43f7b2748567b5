"""From a scan to what the network sees, and from the network's labels back to the scan's grid."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from effseg.data.body import Box, body_box, grow, hold
from effseg.data.intensities import FROM_0_TO_1, RGB, Scaling, Window, is_window, no_hu, parse_window, scaled
from effseg.data.nifti import Scan
from effseg.data.resampling import resample_labels, resample_linear
from effseg.errors import InputError, InputWarning

__all__ = ["Prepared", "Preprocessing"]

AIR = -1.5  # the window's lower end, after `Preprocessing.normalise`
Outside = Sequence[float] | None
"""What lies outside of a normalised volume: a value a channel, as `Preprocessing.outside` says; None: air."""
CROPS = ("body", "none")
MOST_VOXELS = 1 << 31  # after resampling
MOST_OF_ONE = 1000  # voxels that one may become along an axis, or become one; more is a header's mistake

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan as it is fed to the network, before the HU window.

    image: (C, D, H, W) = (C, X, Y, Z) in RAS+, C-contiguous; int16 (HU) or float32 as the scan was. Channels
    without a window are scaled already and float32, with all others.
    box: the part of the scan's RAS volume that was kept. scan_shape: the RAS shape of the whole scan.
    spacing: mm along D, H, W. rescued: wanted voxels outside of the body's box, for which it was made larger.
    """

    image: np.ndarray
    box: Box
    scan_shape: Shape
    spacing: tuple[float, float, float]
    rescued: int = 0

    @property
    def box_shape(self) -> Shape:
        """Voxels of the scan along X, Y, Z that were kept."""
        x, y, z = (side.stop - side.start for side in self.box)
        return x, y, z


@dataclass(frozen=True)
class Preprocessing:
    """Crop to the body, resample, and scale intensities; the same in training and prediction.

    window: (low, high) HU for all channels, or for each channel its own. For a channel that is no CT, what
    nnU-Net makes of it, in each scan apart: None, less the mean of its voxels that are not 0, divided by
    their standard deviation; "noNorm", the values as they are; "rescale_to_0_1", less the lowest, divided by
    the range; "rgb_to_0_1", divided by 255.
    spacing: mm to resample to, or None to keep the scan's.
    crop: "body", the box of all that could be anatomy (see `body_box`) above `threshold` (HU) in the first
    channel with a window that can be CT, and `margin` mm around it, or "none". Without one nothing is cut.

    Raises InputError for values that make no sense.
    """

    window: Window | tuple[Scaling, ...] = (-200.0, 400.0)
    spacing: tuple[float, float, float] | None = None
    crop: str = "body"
    margin: float = 5.0
    threshold: float = -500.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", parse_window(self.window))
        if self.spacing is not None and not all(math.isfinite(step) and step > 0 for step in self.spacing):
            raise InputError(f"spacing: expected three positive distances in mm, got {self.spacing}")
        if self.spacing is not None and len(self.spacing) != 3:
            raise InputError(f"spacing: expected three distances in mm, got {len(self.spacing)}")
        if self.crop not in CROPS:
            raise InputError(f"crop: expected one of {', '.join(CROPS)}, got {self.crop!r}")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise InputError(f"margin: expected a distance of at least 0 mm, got {self.margin:g}")
        if not math.isfinite(self.threshold):
            raise InputError(f"threshold: expected a HU value, got {self.threshold:g}")

    def windows(self, channels: int) -> tuple[Scaling, ...]:
        """What is made of each of `channels` channels. Raises InputError for another number of windows."""
        if not is_window(self.window):
            if len(self.window) != channels:
                raise InputError(f"window: expected one a channel, {channels}, got {len(self.window)}")
            return self.window  # type: ignore[return-value]
        return (self.window,) * channels  # type: ignore[return-value]

    def prepare(self, scan: Scan, wanted: np.ndarray | None = None) -> Prepared:
        """Crop, standardise and resample.

        wanted: mask (X, Y, Z) of voxels that the crop must hold, wherever the body seems to be.
        Warns of a CT that cannot be in HU. Raises InputError where the scan holds no body, has another number
        of channels than there are windows, would have more than 2**31 voxels, or 1000 along an axis instead
        of one, or one instead of 1000.
        """
        shape, spacing = scan.grid.ras_shape, scan.spacing
        windows = self.windows(len(scan.array))
        ct = self._ct(scan, windows)
        box: Box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
        rescued = 0
        if self.crop == "body" and ct is not None:
            body = body_box(scan.array[ct], self.threshold, spacing)
            if body is None:
                raise InputError(
                    f"{scan.paths[0]}: no body to crop to: no voxel is above {self.threshold:g} HU"
                    f" (highest: {scan.array[ct].max():g})"
                )
            box = grow(body, self.margin, spacing, shape)
            if wanted is not None:
                rescued = int(np.count_nonzero(wanted) - np.count_nonzero(wanted[box]))
                box = hold(box, wanted) if rescued else box
        image = np.ascontiguousarray(scan.array[(slice(None),) + box])
        if not all(isinstance(window, tuple) for window in windows):
            try:
                image = scaled(image, windows)
            except InputError as error:
                raise InputError(f"{scan.paths[0]}: {error}") from error
        if self.spacing is not None:
            resampled = self._resampled(image.shape[1:], spacing)
            ratios = [step / wanted for step, wanted in zip(spacing, self.spacing, strict=True)]
            most = max(max(ratio, 1 / ratio) for ratio in ratios)
            if math.prod(resampled) > MOST_VOXELS or most > MOST_OF_ONE:
                raise InputError(
                    f"{scan.paths[0]}: voxels of {_by(spacing)} mm would become {_by(resampled)} voxels of "
                    f"{_by(self.spacing)} mm: expected a header with the scan's voxel size"
                )
            image = resample_linear(image, resampled)
            spacing = self.spacing
        return Prepared(image, box, shape, spacing, rescued)

    def prepare_labels(self, labels: np.ndarray, prepared: Prepared) -> np.ndarray:
        """Labels (X, Y, Z) on the scan's RAS grid -> (D, H, W) on the prepared one; see `resample_labels`.

        Raises ValueError for labels of another shape than the scan's.
        """
        if labels.shape != prepared.scan_shape:
            raise ValueError(f"labels: expected shape {prepared.scan_shape}, got {labels.shape}")
        return resample_labels(labels[prepared.box], _shape(prepared.image))

    def normalise(self, image: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Intensities of a prepared image, of any real dtype -> float32, the window's ends at -1.5 and 1.5.

        `(clip(x, low, high) - (low + high) / 2) / ((high - low) / 3)`; makes one float32 copy. (C, ...), or
        any shape where there is one window for all; a channel without a window stays as it is.
        """
        copy = torch.as_tensor(image).to(torch.float32, copy=True)
        if is_window(self.window):
            _scale(copy, self.window)  # type: ignore[arg-type]
        else:
            for channel, window in zip(copy, self.windows(len(copy)), strict=True):
                if isinstance(window, tuple):
                    _scale(channel, window)
        return copy

    def outside(self, image: np.ndarray | torch.Tensor) -> tuple[float, ...]:
        """What lies outside of a prepared volume (C, D, H, W), normalised or not: a normalised value for each
        channel.

        A channel with a window has air there, "rescale_to_0_1" and "rgb_to_0_1" 0, the lowest value and
        black. In a standardised channel, or one left as it is, no number means nothing whatever was measured,
        and 0 is tissue: its mean, or water in HU. There it is the lowest value of the volume, which is that
        of what a scanner or a mask has left out: padding, or the air around a patient in MR.
        Raises InputError for another number of windows than channels.
        """
        windows = self.windows(len(image))
        return tuple(_outside(channel, how) for channel, how in zip(image, windows, strict=True))

    def restore(self, labels: np.ndarray, prepared: Prepared) -> np.ndarray:
        """Labels (D, H, W) on the prepared grid -> (X, Y, Z) on the scan's, 0 outside of the crop.

        Without resampling, exactly the inverse of the crop; else see `resample_labels`. Raises ValueError for
        labels of another shape than the prepared image's.
        """
        if labels.shape != prepared.image.shape[1:]:
            raise ValueError(f"labels: expected shape {prepared.image.shape[1:]}, got {labels.shape}")
        whole = np.zeros(prepared.scan_shape, labels.dtype)
        whole[prepared.box] = resample_labels(labels, prepared.box_shape)
        return whole

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "Preprocessing":
        """Raises InputError where `entries` are not what `to_dict` gives."""
        known = {field.name for field in fields(cls)}
        try:
            if set(entries) != known:
                raise KeyError(", ".join(sorted(set(entries) ^ known)))
            spacing = None
            if entries["spacing"] is not None:
                x, y, z = entries["spacing"]
                spacing = float(x), float(y), float(z)
            return cls(
                window=parse_window(entries["window"]),
                spacing=spacing,
                crop=str(entries["crop"]),
                margin=float(entries["margin"]),
                threshold=float(entries["threshold"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"preprocessing: expected {', '.join(sorted(known))}, got {entries}") from error

    def _ct(self, scan: Scan, windows: tuple[Scaling, ...]) -> int | None:
        """The first channel with a window that can be CT in HU, or else the first one with a window; warns of
        those before it that cannot."""
        channels = [channel for channel, window in enumerate(windows) if isinstance(window, tuple)]
        for channel in channels:
            why = no_hu(scan.array[channel])
            if why is None:
                return channel
            path = scan.paths[min(channel, len(scan.paths) - 1)]
            warnings.warn(f"{path}: cannot be CT in HU: {why}", InputWarning, stacklevel=3)
        return channels[0] if channels else None

    def _resampled(self, shape: tuple[int, ...], spacing: tuple[float, float, float]) -> Shape:
        assert self.spacing is not None
        x, y, z = (
            max(1, round(extent * step / wanted))
            for extent, step, wanted in zip(shape, spacing, self.spacing, strict=True)
        )
        return x, y, z


def filling(outside: Outside, image: torch.Tensor) -> torch.Tensor:
    """`outside` on the device of an image (C, D, H, W): (C, 1, 1, 1) of its dtype.

    Raises InputError for another number of values than channels.
    """
    values = [AIR] * len(image) if outside is None else list(outside)
    if len(values) != len(image):
        raise InputError(f"outside: expected one value a channel, {len(image)}, got {len(values)}")
    return torch.tensor(values, dtype=image.dtype).to(image.device).view(-1, 1, 1, 1)


def _outside(channel: np.ndarray | torch.Tensor, how: Scaling) -> float:
    if isinstance(how, tuple):
        return AIR
    return 0.0 if how in (FROM_0_TO_1, RGB) else float(channel.min())


def _scale(values: torch.Tensor, window: Window) -> None:
    low, high = window
    values.clamp_(low, high).sub_((low + high) / 2).div_((high - low) / 3)


def _shape(image: np.ndarray) -> Shape:
    depth, height, width = image.shape[1:]
    return depth, height, width


def _by(sizes: tuple[float, ...]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)
