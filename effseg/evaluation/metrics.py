"""Metrics of a segmentation against a reference, per organ:

- Dice, IoU, TP, FP, FN, TN, n_pred, n_ref: voxel counts, as nnU-Net defines them.
- NSD: normalised surface Dice, the share of both surfaces (in mm2, after marching cubes) that lies within a
  tolerance in mm of the other one. Nikolov et al. 2018, arXiv 1809.04430; MONAI's implementation.
- HD95: the larger of the two 95th percentiles, in mm, of the distances from one surface's voxels to the other
  surface. MONAI's implementation.

Absent organs, as the field treats them (nnU-Net; Maier-Hein et al., Metrics reloaded, 2024,
doi 10.1038/s41592-023-02151-z; BraTS): absent in prediction and reference alike, every ratio and distance is
NaN and left out of means. Absent in one of them alone, Dice, IoU and NSD are 0 and HD95 is the worst that
could be: the diagonal of the volume in mm.
"""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

CONVENTIONS = {
    "absent in both": "Dice, IoU, NSD and HD95 are NaN and left out of every mean",
    "absent in one": "Dice, IoU and NSD are 0, HD95 is the diagonal of the volume in mm",
    "mean": "per organ over the cases, then foreground_mean over the organs; NaN left out of both",
    "NSD": "share of surface area within tolerance_mm, Nikolov et al. 2018",
    "HD95": "mm, the larger of the two directed 95th percentiles",
}

_CHUNK = 1 << 22  # voxels whose class indices are widened to 64 bits at a time


def confusion_matrix(
    prediction: np.ndarray, reference: np.ndarray, num_classes: int, ignore: int | None = None
) -> np.ndarray:
    """Count voxels by class in the reference (rows) and in the prediction (columns).

    Args:
        prediction, reference: class indices below `num_classes`, any integer dtype, the same shape.
        num_classes: K, background included.
        ignore: index in the reference whose voxels are not counted.

    Returns: (K, K) int64. Memory beyond the inputs stays under 150 MB at any volume.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction: expected shape {reference.shape}, got {prediction.shape}")
    flat_prediction, flat_reference = prediction.reshape(-1), reference.reshape(-1)
    counts = np.zeros(num_classes * num_classes, np.int64)
    for start in range(0, flat_reference.size, _CHUNK):
        rows = flat_reference[start : start + _CHUNK].astype(np.int64)
        columns = flat_prediction[start : start + _CHUNK].astype(np.int64)
        if ignore is not None:
            kept = rows != ignore
            rows, columns = rows[kept], columns[kept]
        for name, found in (("prediction", columns), ("reference", rows)):
            if found.size and not (found.min() >= 0 and found.max() < num_classes):
                raise ValueError(
                    f"{name}: expected classes 0 to {num_classes - 1}, got {found.min()} to {found.max()}"
                )
        counts += np.bincount(rows * num_classes + columns, minlength=counts.size)
    return counts.reshape(num_classes, num_classes)


def dice_per_class(
    prediction: np.ndarray, reference: np.ndarray, num_classes: int, ignore: int | None = None
) -> np.ndarray:
    """Dice of every class, background first: float64 (num_classes,), NaN where absent in both."""
    counts = confusion_matrix(prediction, reference, num_classes, ignore)
    sizes = counts.sum(0) + counts.sum(1)
    dice = np.full(num_classes, np.nan)
    np.divide(2.0 * counts.diagonal(), sizes, out=dice, where=sizes > 0)
    return dice


def case_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    num_classes: int,
    spacing: Sequence[float],
    tolerance_mm: float,
    ignore: int | None = None,
) -> dict[int, dict[str, float | int]]:
    """Every metric of every foreground class of one case; see the module for their definitions.

    Args:
        prediction, reference: class indices (X, Y, Z), any integer dtype.
        num_classes: background included.
        spacing: mm along X, Y, Z.
        tolerance_mm: tolerance of NSD.
        ignore: index in the reference whose voxels count nowhere; surfaces end there.

    Returns: class index -> {"Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref", "NSD", "HD95"}.
    """
    counts = confusion_matrix(prediction, reference, num_classes, ignore)
    if ignore is not None:
        outside = reference == ignore
        prediction, reference = np.where(outside, 0, prediction), np.where(outside, 0, reference)
    diagonal = float(np.linalg.norm(np.multiply(reference.shape, spacing)))
    boxes = _joint_boxes(prediction, reference, num_classes)
    metrics = {}
    for label in range(1, num_classes):
        overlap = _overlap_metrics(counts, label)
        if overlap["n_pred"] and overlap["n_ref"]:
            found, true = (volume[boxes[label]] == label for volume in (prediction, reference))
            surface = _surface_metrics(found, true, spacing, tolerance_mm)
        elif overlap["n_pred"] or overlap["n_ref"]:
            surface = {"NSD": 0.0, "HD95": diagonal}
        else:
            surface = {"NSD": float("nan"), "HD95": float("nan")}
        metrics[label] = {**overlap, **surface}
    return metrics


def _overlap_metrics(counts: np.ndarray, label: int) -> dict[str, float | int]:
    tp = int(counts[label, label])
    fp = int(counts[:, label].sum()) - tp
    fn = int(counts[label].sum()) - tp
    present = tp + fp + fn > 0
    return {
        "Dice": 2 * tp / (2 * tp + fp + fn) if present else float("nan"),
        "IoU": tp / (tp + fp + fn) if present else float("nan"),
        "TP": tp,
        "FP": fp,
        "FN": fn,
        "TN": int(counts.sum()) - tp - fp - fn,
        "n_pred": tp + fp,
        "n_ref": tp + fn,
    }


def _surface_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """NSD and HD95 of two non-empty masks (MONAI adds the margin of background around them itself)."""
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    found, true = torch.from_numpy(prediction)[None, None], torch.from_numpy(reference)[None, None]
    edges = [float(edge) for edge in spacing]
    with warnings.catch_warnings():  # MONAI 1.5 and 1.6 warn of an argument that they pass to themselves
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        nsd = compute_surface_dice(
            found, true, [tolerance_mm], include_background=True, spacing=edges, use_subvoxels=True
        )
        hd95 = compute_hausdorff_distance(found, true, include_background=True, percentile=95, spacing=edges)
    return {"NSD": float(nsd), "HD95": float(hd95)}


def _joint_boxes(
    prediction: np.ndarray, reference: np.ndarray, num_classes: int
) -> dict[int, tuple[slice, ...]]:
    """The smallest box that holds a class in both volumes; classes in neither volume have none."""
    from scipy.ndimage import find_objects

    boxes: dict[int, tuple[slice, ...]] = {}
    for volume in (prediction, reference):
        found = find_objects(volume, max_label=num_classes - 1)
        for label, box in enumerate(found, start=1):
            if box is None:
                continue
            other = boxes.get(label, box)
            boxes[label] = tuple(
                slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box, other, strict=True)
            )
    return boxes


def mean_metrics(metrics: Sequence[Mapping[str, float | int]]) -> dict[str, float]:
    """Mean of every metric over cases (or organs), NaN left out; NaN where nothing is left."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return {key: float(np.nanmean([row[key] for row in metrics])) for key in metrics[0]}
