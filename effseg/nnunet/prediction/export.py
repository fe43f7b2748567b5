"""Planes of logits on the network's grid to a label volume, and to probabilities, on the scan's own."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from effseg.errors import InputError
from effseg.nnunet.prediction.planes import (
    AlongFirstAxis,
    Axis,
    InPlane,
    most_probable,
    probabilities,
    regions,
)
from effseg.nnunet.prediction.preprocessing import SPLINE_SETTINGS, SPLINES, Properties, with_own_first_axis

TORCH = "resample_torch_fornnunet"
NONE = "no_resampling_hack"
SETTINGS = {
    SPLINES: SPLINE_SETTINGS,
    TORCH: {
        "is_seg", "num_threads", "device", "memefficient_seg_resampling", "force_separate_z",
        "separate_z_anisotropy_threshold", "mode", "aniso_axis_mode",
    },
    NONE: set(),
}  # fmt: skip
ALLOWED = {
    "is_seg": (False,), "order": (0, 1), "order_z": (0, 1), "mode": ("linear",),
    "aniso_axis_mode": ("nearest-exact", "linear"),
}  # fmt: skip
OnPlane = Callable[[int, Tensor], None]


def check_resampling(configuration: Any) -> None:
    """Raises InputError where probabilities are resampled otherwise than linearly or to the nearest."""
    entries = configuration.configuration
    name, settings = entries["resampling_fn_probabilities"], entries["resampling_fn_probabilities_kwargs"]
    if name not in SETTINGS:
        raise InputError(f"resampling_fn_probabilities: expected one of {', '.join(SETTINGS)}, got {name!r}")
    unknown = sorted(set(settings) - SETTINGS[name])
    if unknown:
        raise InputError(f"resampling_fn_probabilities_kwargs: {', '.join(unknown)} is not known to {name}")
    if name == SPLINES:
        settings = {"order": 3} | settings
    for key, values in ALLOWED.items():
        if key in settings and settings[key] not in values:
            raise InputError(
                f"resampling_fn_probabilities_kwargs: {key}: expected one of {values}, got {settings[key]!r}"
            )


def grid_axes(shape: Sequence[int], properties: Properties, plans: Any, configuration: Any) -> list[Axis]:
    """How logits of `shape` (D, H, W) come to the grid of the cropped scan, axis by axis."""
    from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

    wanted = properties["shape_after_cropping_and_before_resampling"]
    entries = configuration.configuration
    name, settings = entries["resampling_fn_probabilities"], entries["resampling_fn_probabilities_kwargs"]
    if name == NONE and tuple(shape) != tuple(wanted):
        raise InputError(
            f"{NONE}: expected the scan's {tuple(wanted)} voxels, the network has {tuple(shape)}"
        )
    own = [properties["spacing"][axis] for axis in plans.transpose_forward]
    rule = {key: settings[key] for key in ("separate_z_anisotropy_threshold",) if key in settings}
    forced = settings.get("force_separate_z", None if name == TORCH else False)
    separate, thick = determine_do_sep_z_and_axis(
        forced, with_own_first_axis(configuration.spacing, own), own, **rule
    )
    linear = settings.get("order", 1) == 1
    across = settings.get("order_z", 0) == 1 or settings.get("aniso_axis_mode") == "linear"
    return [
        Axis(extent, size, across if separate and axis == thick else linear)
        for axis, (extent, size) in enumerate(zip(shape, wanted, strict=True))
    ]


class LabelVolume:
    """Takes planes of logits in order and fills labels on the scan's own grid; background around the crop.

    axes: as of `grid_axes`; inside: where the preprocessed image lies in the padded one. on_probabilities:
    given every plane's index in the uncropped volume and its probabilities (K, H, W) float32, of the crop.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        inside: Sequence[slice],
        properties: Properties,
        labels: Any,
        on_probabilities: OnPlane | None = None,
    ) -> None:
        self.axes, self.inside, self.on_probabilities = axes, inside, on_probabilities
        self.order = labels.regions_class_order if labels.has_regions else None
        self.box = properties["bbox_used_for_cropping"]
        dtype = np.uint8 if len(labels.foreground_labels) < 255 else np.uint16
        self.volume = np.zeros(properties["shape_before_cropping"], dtype)
        self._along, self._in_plane = AlongFirstAxis(axes[0]), InPlane(axes[1:])

    def push(self, index: int, logits: Callable[[], Tensor]) -> None:
        """index: in the padded volume; logits: gives its plane (K, H, W)."""
        depth, rows, columns = self.inside
        index -= depth.start
        if not 0 <= index < depth.stop - depth.start or index not in self._along.used:
            return
        for target, plane in self._along.push(index, logits()[:, rows, columns]):
            self._write(self.box[0][0] + target, plane)

    def _write(self, index: int, plane: Tensor) -> None:
        if self.order is None:
            found = most_probable(plane, self._in_plane)
        else:
            found = regions(plane, self._in_plane, self.order)
        rows, columns = (slice(*bounds) for bounds in self.box[1:])
        self.volume[index, rows, columns] = found.cpu().numpy()
        if self.on_probabilities is not None:
            self.on_probabilities(index, probabilities(plane, self._in_plane, self.order is not None))
