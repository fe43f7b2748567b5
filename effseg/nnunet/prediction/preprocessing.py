"""A scan as nnU-Net's networks expect it, with no more than a few copies of it in memory."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from effseg.data.nifti import whole_size
from effseg.errors import InputError
from effseg.nnunet.prediction.interpolation import resample_image

SPLINES = "resample_data_or_seg_to_shape"
SPLINE_SETTINGS = {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"}
OUTSIDE = -1  # nnU-Net's mark of what lies around an image that is 0 there

Properties = dict[str, Any]


def read(reader: Any, files: Sequence[Path]) -> tuple[np.ndarray, Properties]:
    """(C, z, y, x) float32 and nnU-Net's properties of the scan. Raises InputError naming the scan."""
    found: tuple[np.ndarray, Properties] = _read(reader.read_images, [str(file) for file in files], files)
    return found


def read_labels(reader: Any, file: Path) -> np.ndarray:
    """(z, y, x) of a label map. Raises InputError naming it."""
    if not file.is_file():
        raise InputError(f"{file}: expected the previous stage's labels, found no file")
    labels, _ = _read(reader.read_seg, str(file), [file])
    found: np.ndarray = labels[0]
    return found


def _read(function: Any, argument: Any, files: Sequence[Path]) -> Any:
    """What a method of nnU-Net's readers returns."""
    for file in files:
        _check_whole(file)
    try:
        return function(argument)
    except (RuntimeError, AssertionError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[-200:]
        reader = type(function.__self__).__name__
        raise InputError(f"{files[0]}: cannot be read by {reader}: {reason}") from error


def _check_whole(file: Path) -> None:
    """SimpleITK takes what is missing of a truncated file for zeros, or for what lay in memory there."""
    if file.suffix in _WHOLE_SIZES:
        wanted, found = _WHOLE_SIZES[file.suffix](file), file.stat().st_size if file.is_file() else 0
        if found < wanted:
            raise InputError(f"{file}: truncated: its header wants {wanted} bytes, there are {found}")
    if file.suffix != ".gz":
        return
    try:
        with gzip.open(file, "rb") as stream:
            while stream.read(2**22):
                pass
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{file}: damaged or truncated: {error}") from None


def _gipl_size(file: Path) -> int:
    """Bytes of a whole GIPL file: a header of 256 bytes, big-endian, with four sizes and a type."""
    header = b""
    if file.is_file():
        with file.open("rb") as stream:
            header = stream.read(10)
    if len(header) < 10:
        return 256
    *sizes, kind = np.frombuffer(header, ">u2").tolist()
    return 256 + math.prod(max(1, size) for size in sizes) * _GIPL_BYTES.get(kind, 0)


_GIPL_BYTES = {7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}
_WHOLE_SIZES = {".nii": whole_size, ".gipl": _gipl_size}


def prepare(
    image: np.ndarray,
    properties: Properties,
    plans: Any,
    configuration: Any,
    previous: np.ndarray | None = None,
) -> tuple[Tensor, Properties]:
    """Transposed, cropped to what is not 0, normalised and resampled: (C, D, H, W) float32.

    image: (C, z, y, x) float32, used up; properties: as of nnU-Net's readers, returned with those that
    nnU-Net's preprocessing adds. plans, configuration: nnU-Net's managers. previous: labels (z, y, x) of a
    cascade's previous stage, which become the last channel, as numbers.
    Raises InputError for values that are not finite, for labels that int16 does not hold and for schemes that
    are none of nnU-Net's.
    """
    if previous is not None and previous.shape != image.shape[1:]:
        raise InputError(
            f"previous stage: expected labels of the scan's {_listed(image.shape[1:])} voxels, got "
            f"{_listed(previous.shape)}"
        )
    forward = plans.transpose_forward
    image = image.transpose(0, *(axis + 1 for axis in forward))
    spacing = [properties["spacing"][axis] for axis in forward]
    box = nonzero_box(image)
    planes, rows, columns = (slice(*bounds) for bounds in box)
    cropped = image[:, planes, rows, columns]
    added = {
        "shape_before_cropping": image.shape[1:],
        "bbox_used_for_cropping": box,
        "shape_after_cropping_and_before_resampling": cropped.shape[1:],
    }
    cropped = np.ascontiguousarray(cropped, np.float32)
    del image
    labels = None
    if previous is not None:
        # Rounded: what is stored as 1.9999 is 2.
        rounded = np.rint(previous.transpose(forward)[planes, rows, columns])
        with np.errstate(invalid="ignore"):
            labels = rounded.astype(np.int16)
        if (labels != rounded).any():
            wrong = rounded[labels != rounded][0]
            raise InputError(f"previous stage: expected labels from -32768 to 32767, got {wrong:g}")
        del rounded
        labels[(labels == 0) & (_outside(cropped) == OUTSIDE)] = OUTSIDE
    _normalise(cropped, plans, configuration, labels)
    found = _resampled(cropped, spacing, configuration)
    if labels is not None:
        del cropped
        found = np.concatenate([found, _resampled_labels(labels, found.shape[1:], spacing, configuration)])
    return torch.from_numpy(found), properties | added


def nonzero_box(image: np.ndarray) -> list[list[int]]:
    """First voxel and end of what is not 0 in any channel of (C, D, H, W), by axis; of all where all is 0."""
    planes = np.zeros(image.shape[1], bool)
    within = np.zeros(image.shape[2:], bool)
    for channel in image:
        for index, plane in enumerate(channel):
            nonzero = plane != 0
            planes[index] |= nonzero.any()
            within |= nonzero
    lines = [planes, np.any(within, axis=1), np.any(within, axis=0)]
    if not planes.any():
        return [[0, extent] for extent in image.shape[1:]]
    return [[int(line.argmax()), len(line) - int(line[::-1].argmax())] for line in lines]


def _normalise(image: np.ndarray, plans: Any, configuration: Any, labels: np.ndarray | None) -> None:
    """Channel by channel with nnU-Net's schemes, in place."""
    from nnunetv2.preprocessing.normalization import default_normalization_schemes as schemes

    names = configuration.normalization_schemes
    if len(names) != len(image):
        raise InputError(f"scan: expected {len(names)} channels, got {len(image)}")
    masked = configuration.use_mask_for_norm
    outside = labels
    if labels is None and any(masked):
        outside = _outside(image)
    for index, name in enumerate(names):
        scheme = getattr(schemes, name, None)
        if scheme is None:
            raise InputError(f"normalization_schemes: expected one of nnU-Net's own, got {name!r}")
        known = plans.foreground_intensity_properties_per_channel[str(index)]
        run = scheme(use_mask_for_norm=masked[index], intensityproperties=known).run
        image[index] = run(image[index], outside)
        if not np.isfinite(image[index].sum(dtype=np.float64)):
            raise InputError(f"scan: channel {index}: expected finite intensities, got inf or NaN")


def _outside(image: np.ndarray) -> np.ndarray:
    """(D, H, W) int8: OUTSIDE around what is not 0, which has no holes, else 0."""
    nonzero = (image != 0).any(0)
    return np.where(ndimage.binary_fill_holes(nonzero), np.int8(0), np.int8(OUTSIDE))


def _resampled(image: np.ndarray, spacing: Sequence[float], configuration: Any) -> np.ndarray:
    from nnunetv2.preprocessing.resampling.default_resampling import (
        compute_new_shape,
        determine_do_sep_z_and_axis,
    )

    target = with_own_first_axis(configuration.spacing, spacing)
    shape = compute_new_shape(image.shape[1:], spacing, target)
    if not all(shape):
        raise InputError(
            f"scan: too thin for the model's spacing of {_listed(target)} mm: {_listed(shape)} voxels"
        )
    settings = configuration.configuration["resampling_fn_data_kwargs"]
    own = configuration.configuration["resampling_fn_data"] == SPLINES and not settings.get("is_seg")
    if not own or not set(settings) <= SPLINE_SETTINGS:
        found = configuration.resampling_fn_data(image, shape, spacing, target)
        return np.ascontiguousarray(found, np.float32)
    rule = {key: settings[key] for key in ("separate_z_anisotropy_threshold",) if key in settings}
    separate, axis = determine_do_sep_z_and_axis(
        settings.get("force_separate_z", False), spacing, target, **rule
    )
    return resample_image(
        image,
        [int(extent) for extent in shape],
        settings.get("order", 3),
        int(axis) if separate else None,
        settings.get("order_z", 0),
    )


def _resampled_labels(
    labels: np.ndarray, shape: Sequence[int], spacing: Sequence[float], configuration: Any
) -> np.ndarray:
    """(1, D, H, W) float32, by nnU-Net's own rule, which works label by label."""
    target = with_own_first_axis(configuration.spacing, spacing)
    found = configuration.resampling_fn_seg(labels[None], shape, spacing, target)
    return np.asarray(found, np.float32)


def with_own_first_axis(spacing: Sequence[float], own: Sequence[float]) -> list[float]:
    """A configuration's spacing; a 2D one leaves the first axis of a scan with spacing `own` as it is."""
    return [*own[: len(own) - len(spacing)], *spacing]


def _listed(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)
