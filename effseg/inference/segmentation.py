"""A prepared scan through one network: its classes, or the probabilities of all classes."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy import ndimage

from effseg.common.formats import label_dtype
from effseg.data.preprocessing import Outside, Prepared, Preprocessing, filling
from effseg.errors import InputError
from effseg.inference.probabilities import Probabilities, most_probable
from effseg.models.base import SegmentationModel
from effseg.parallel.partition import current, own_rows
from effseg.parallel.reduction import whole

OVERLAP = 0.5  # of neighbouring patches, where a network was trained on patches

Size = tuple[int, int, int]


def segment_prepared(
    model: SegmentationModel,
    preprocessing: Preprocessing,
    prepared: Prepared,
    *,
    bf16: bool = False,
    patch_size: Size | None = None,
) -> np.ndarray:
    """Classes (X, Y, Z), uint8 or int16, on the scan's own grid, 0 outside of the crop.

    Where the scan was resampled it is the probabilities that are brought back to its grid, as in
    `most_probable`: labels would lose what is finer than a voxel.
    """
    image = preprocessing.normalise(prepared.image)[None]
    outside = preprocessing.outside(prepared.image)
    if prepared.image.shape[1:] == prepared.box_shape:
        classes = segment(model, image, bf16=bf16, patch_size=patch_size, outside=outside)[0].numpy()
        return preprocessing.restore(classes, prepared)
    values = probabilities(model, image, bf16=bf16, patch_size=patch_size, outside=outside)
    del image
    return most_probable([Probabilities(values, prepared.box)], prepared.scan_shape)


@torch.no_grad()
def segment(
    model: SegmentationModel,
    image: torch.Tensor,
    *,
    bf16: bool = False,
    patch_size: Size | None = None,
    outside: Outside = None,
) -> torch.Tensor:
    """Classes (N, D, H, W) uint8 or int16, on the CPU, of a normalised image (N, C, D, H, W).

    The whole volume at once; with `patch_size` MONAI's sliding window with Gaussian weights, whose logits
    are put together on the CPU. outside: what patches show around a smaller volume, a value a channel as
    `Preprocessing.outside` gives it, or air. The model runs in evaluation mode and comes back in the mode it
    was in. Where processes share a volume (`effseg.parallel.split`) each gives the whole image, computes its
    rows of it and gets the whole result; not with `patch_size`.
    """
    if patch_size is not None:
        logits = _logits_of_patches(model, image, bf16, patch_size, outside)
        return logits.argmax(1).to(label_dtype(logits.shape[1]))
    device, total = next(model.parameters()).device, image.shape[2]
    rows = slice(*own_rows(total))
    with _evaluating(model, bf16):
        return whole(model.segment(image[:, :, rows].to(device)), total).cpu()


@torch.no_grad()
def probabilities(
    model: SegmentationModel,
    image: torch.Tensor,
    *,
    bf16: bool = False,
    patch_size: Size | None = None,
    outside: Outside = None,
) -> np.ndarray:
    """Probabilities (K, D, H, W) float16, on the CPU, of one normalised image (1, C, D, H, W); see `segment`.

    2 K bytes a voxel of main memory; a network that is not ours makes K logits of every voxel first, as a
    sliding window does, in main memory. Where processes share a volume each gets the whole result.
    Raises InputError for probabilities that are not finite.
    """
    device, total = next(model.parameters()).device, image.shape[2]
    if patch_size is not None:
        logits = _logits_of_patches(model, image, bf16, patch_size, outside)[0]
        found = torch.empty(logits.shape, dtype=torch.float16)
        for row in range(total):
            found[:, row] = logits[:, row].float().softmax(0)
    else:
        rows = slice(*own_rows(total))
        with _evaluating(model, bf16):
            found = model.probabilities(image[:, :, rows].to(device))[0]
        if found.shape[1] < total:
            found = torch.cat([whole(part[None].to(device), total).cpu() for part in found])
    if not found[0].isfinite().all():
        raise InputError("the network gives probabilities that are not finite")
    return found.numpy()


@contextmanager
def _evaluating(model: SegmentationModel, bf16: bool) -> Iterator[None]:
    """In evaluation mode, and then in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        model.train(training)


def _logits_of_patches(
    model: SegmentationModel, image: torch.Tensor, bf16: bool, patch_size: Size, outside: Outside
) -> torch.Tensor:
    from monai.inferers import SlidingWindowInferer

    if current() is not None:
        raise InputError("split_volume: expected a network trained on whole volumes, got one for patches")

    inferer = SlidingWindowInferer(
        patch_size,
        overlap=OVERLAP,
        mode="gaussian",
        sw_device=next(model.parameters()).device,
        device=torch.device("cpu"),
    )
    padded, inside = _surrounded(image, patch_size, outside)
    with _evaluating(model, bf16):
        logits = inferer(padded, model)[inside]
    if not logits.isfinite().all():
        raise InputError("the network gives logits that are not finite")
    return logits


def _surrounded(image: torch.Tensor, size: Size, outside: Outside) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """image (N, C, D, H, W) in the middle of one of at least `size`, and where: MONAI pads all channels with
    one value."""
    sizes = [max(extent, wanted) for extent, wanted in zip(image.shape[2:], size, strict=True)]
    starts = [(wanted - extent) // 2 for extent, wanted in zip(image.shape[2:], sizes, strict=True)]
    own = (slice(start, start + extent) for start, extent in zip(starts, image.shape[2:], strict=True))
    inside = (slice(None), slice(None), *own)
    if sizes == list(image.shape[2:]):
        return image, inside
    padded = filling(outside, image[0]).expand(*image.shape[:2], *sizes).clone()
    padded[inside] = image
    return padded, inside


def keep_largest_components(classes: np.ndarray) -> np.ndarray:
    """`classes` (D, H, W) with all but the largest connected component of every foreground class set to 0.

    Voxels are connected across faces, edges and corners.
    """
    kept = np.zeros_like(classes)
    for index, box in enumerate(ndimage.find_objects(classes.astype(np.int32, copy=False)), start=1):
        if box is None:
            continue
        parts, _ = ndimage.label(classes[box] == index, np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        kept[box][parts == sizes.argmax()] = index
    return kept
