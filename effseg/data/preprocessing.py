"""From a scan to what the network sees, and from the network's labels back to the scan's grid."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from effseg.data.body import Box, body_box, grow
from effseg.data.nifti import Scan
from effseg.data.resampling import nearest_indices, resample_linear
from effseg.errors import InputError

AIR = -1.5  # the window's lower end, after `Preprocessing.normalise`
CROPS = ("body", "none")

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan as it is fed to the network, before the HU window.

    image: (C, D, H, W) = (C, X, Y, Z) in RAS+, C-contiguous; int16 (HU) or float32 as the scan was.
    box: the part of the scan's RAS volume that was kept. scan_shape: the RAS shape of the whole scan.
    spacing: mm along D, H, W.
    """

    image: np.ndarray
    box: Box
    scan_shape: Shape
    spacing: tuple[float, float, float]

    @property
    def box_shape(self) -> Shape:
        x, y, z = (side.stop - side.start for side in self.box)
        return x, y, z


@dataclass(frozen=True)
class Preprocessing:
    """Crop to the body, resample, and scale a window of intensities; the same in training and prediction.

    window: (low, high) HU. spacing: mm to resample to, or None to keep the scan's.
    crop: "body", the bounding box of the largest connected component above `threshold` (HU) in the first
    channel with `margin` mm around it, or "none". Nothing but the scan decides on the crop.
    """

    window: tuple[float, float] = (-200.0, 400.0)
    spacing: tuple[float, float, float] | None = None
    crop: str = "body"
    margin: float = 5.0
    threshold: float = -500.0

    def __post_init__(self) -> None:
        low, high = self.window
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InputError(f"window: expected two HU values, the lower first, got {low:g} and {high:g}")
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

    def prepare(self, scan: Scan) -> Prepared:
        """Crop and resample; raises InputError where the scan holds no body."""
        shape, spacing = scan.grid.ras_shape, scan.spacing
        box: Box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
        if self.crop == "body":
            body = body_box(scan.array[0], self.threshold)
            if body is None:
                raise InputError(
                    f"{scan.paths[0]}: no body to crop to: no voxel is above {self.threshold:g} HU"
                    f" (highest: {scan.array[0].max():g})"
                )
            box = grow(body, self.margin, spacing, shape)
        image = np.ascontiguousarray(scan.array[(slice(None),) + box])
        if self.spacing is not None:
            image = resample_linear(image, self._resampled(image.shape[1:], spacing))
            spacing = self.spacing
        return Prepared(image, box, shape, spacing)

    def prepare_labels(self, labels: np.ndarray, prepared: Prepared) -> np.ndarray:
        """Labels (X, Y, Z) on the scan's RAS grid -> (D, H, W) on the prepared one; nearest neighbour."""
        if labels.shape != prepared.scan_shape:
            raise ValueError(f"labels: expected shape {prepared.scan_shape}, got {labels.shape}")
        return _nearest(labels[prepared.box], prepared.image.shape[1:])

    def normalise(self, image: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Intensities of any shape and real dtype -> float32, the window's ends at -1.5 and 1.5.

        `(clip(x, low, high) - (low + high) / 2) / ((high - low) / 3)`; makes one float32 copy.
        """
        low, high = self.window
        copy = torch.as_tensor(image).to(torch.float32, copy=True)
        return copy.clamp_(low, high).sub_((low + high) / 2).div_((high - low) / 3)

    def restore(self, labels: np.ndarray, prepared: Prepared) -> np.ndarray:
        """Labels (D, H, W) on the prepared grid -> (X, Y, Z) on the scan's, 0 outside of the crop.

        Without resampling, exactly the inverse of the crop; else the nearest voxel's label.
        """
        if labels.shape != prepared.image.shape[1:]:
            raise ValueError(f"labels: expected shape {prepared.image.shape[1:]}, got {labels.shape}")
        whole = np.zeros(prepared.scan_shape, labels.dtype)
        whole[prepared.box] = _nearest(labels, prepared.box_shape)
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
            low, high = entries["window"]
            spacing = None
            if entries["spacing"] is not None:
                x, y, z = entries["spacing"]
                spacing = float(x), float(y), float(z)
            return cls(
                window=(float(low), float(high)),
                spacing=spacing,
                crop=str(entries["crop"]),
                margin=float(entries["margin"]),
                threshold=float(entries["threshold"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"preprocessing: expected {', '.join(sorted(known))}, got {entries}") from error

    def _resampled(self, shape: tuple[int, ...], spacing: tuple[float, float, float]) -> Shape:
        assert self.spacing is not None
        x, y, z = (
            max(1, round(extent * step / wanted))
            for extent, step, wanted in zip(shape, spacing, self.spacing, strict=True)
        )
        return x, y, z


def _nearest(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if labels.shape == shape:
        return np.ascontiguousarray(labels)
    return labels[np.ix_(*map(nearest_indices, labels.shape, shape))]
