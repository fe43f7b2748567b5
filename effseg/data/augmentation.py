"""Random changes of whole volumes while training, on MONAI's transforms."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    Compose,
    MapTransform,
    RandGaussianNoised,
    Randomizable,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from monai.transforms.utils import create_rotate, create_scale, create_translate
from torch.nn.functional import affine_grid, grid_sample

from effseg.data import device_augmentation
from effseg.data.device_augmentation import Changes, normalised
from effseg.data.mirroring import Pairs, exchange
from effseg.data.preprocessing import AIR, Outside, filling

Spacing = tuple[float, float, float]
Augmentation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def augmentation(
    mirror: Pairs | None = None, strength: float = 1.0, on_device: bool = False, shifts: bool = True
) -> Augmentation:
    """A function (image, labels, seed, spacing=(1, 1, 1), outside=None) -> (image, labels), the same for the
    same seed.

    image: (C, D, H, W) float32 as `Preprocessing.normalise` gives it, labels: (D, H, W) of any integer
    dtype, axes in RAS+, spacing in mm, outside: a value a channel as `Preprocessing.outside` gives it of the
    whole volume, None: air; both come back as plain tensors of the same shape, dtype and device, the
    arguments are left as they are. Safe to call from several threads.

    With `strength` 1: in 3 of 4 cases a rotation of up to 8 degrees about each axis, in mm and not in
    voxels, a zoom of 0.88 to 1.12, up to 4 % apart between the axes, and a shift of up to an eighth of the
    volume's size, with `outside` coming in; intensities times 0.9 to 1.1, plus -0.1 to 0.1; in 3 of 10 noise
    with a standard deviation of up to 0.05. `strength` scales the ranges. With `mirror`, every second volume
    is mirrored left to right and these pairs of classes change places; () for none.
    About 45 ns on one core and 30 bytes a voxel.

    shifts: False for patches, which lie anywhere already: a shift would bring `outside` into the middle of a
    body.
    on_device: for tensors that lie on the device that trains, where it takes 11 bytes a voxel, the volume
    included. The changes are the same but for the noise, which a generator of the device draws; the image's
    memory is used up. Devices differ by rounding.
    """

    def augment(
        image: torch.Tensor,
        labels: torch.Tensor,
        seed: int,
        spacing: Spacing = (1.0, 1.0, 1.0),
        outside: Outside = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fill = filling(outside, image)
        # Made anew every time: MONAI's transforms keep their random state and what they drew.
        transforms = [
            RandomPoseD(strength, spacing, fill, shifts),
            RandScaleIntensityd("image", factors=0.1 * strength, prob=1.0),
            RandShiftIntensityd("image", offsets=0.1 * strength, prob=1.0),
            RandGaussianNoised("image", std=0.05 * strength, prob=0.3),
        ]
        if mirror is not None:
            transforms.append(RandomMirrorD(mirror))
        compose = Compose(transforms).set_random_state(seed=seed)
        if on_device:
            changes = _drawn(transforms, image.shape[1:])
            return device_augmentation.change(image, labels, changes, seed, fill)
        sample = compose({"image": image, "labels": labels[None]})
        return _plain(sample["image"]), _plain(sample["labels"])[0]

    return augment


def _drawn(transforms: Sequence[Any], shape: Sequence[int]) -> Changes:
    """What the transforms would do to a volume, drawn in their order."""
    pose, scale, shift, noise, *mirror = transforms
    matrix = pose.randomize(shape)
    for transform, inner in ((scale, scale.scaler), (shift, shift.shifter)):
        transform.randomize(None)
        inner.randomize(None)
    noise.randomize(None)
    deviation = 0.0
    if noise._do_transform:
        inner = noise.rand_gaussian_noise
        inner.R.rand()  # whether to, of probability 1
        deviation = inner.R.uniform(0, inner.std)
    mirrored = mirror[0].pairs if mirror and mirror[0].randomize() else None
    return Changes(matrix, 1 + scale.scaler.factor, shift.shifter._offset, deviation, mirrored)


class RandomPoseD(Randomizable, MapTransform):
    """Rotation, zoom and shift of "image" (C, D, H, W) and "labels" (1, D, H, W), drawn at random.

    fill: what comes in, of all channels or (C, 1, 1, 1). shifts: whether it is shifted.

    MONAI's RandAffined turns in voxels, which shears anisotropic volumes, draws a zoom for every axis
    apart, and takes 80 bytes a voxel; here both volumes share one grid, made slab by slab.
    """

    def __init__(
        self, strength: float, spacing: Spacing, fill: torch.Tensor | float = AIR, shifts: bool = True
    ) -> None:
        MapTransform.__init__(self, ("image", "labels"))
        self.shifts = shifts
        self.strength = strength
        self.spacing = spacing
        self.fill = fill

    def randomize(self, shape: Sequence[int]) -> np.ndarray | None:
        """(4, 4) from voxels of the result to voxels of the source, or None to leave the volume."""
        moves = self.R.random() < 0.75
        angles = np.deg2rad(self.R.uniform(-8, 8, 3)) * self.strength
        farthest = 1 - 0.12 * self.strength, 1 + 0.12 * self.strength
        zoom = 1 + self.strength * self.R.uniform(-0.12, 0.12)
        stretch = 1 + self.strength * self.R.uniform(-0.04, 0.04, 3)
        shift = self.strength * self.R.uniform(-0.125, 0.125, 3) * shape
        if not moves or self.strength == 0:
            return None
        centre = (np.array(shape) - 1) / 2
        to_mm = create_scale(3, self.spacing) @ create_translate(3, -centre)
        turn = create_rotate(3, angles) @ create_scale(3, np.clip(zoom * stretch, *farthest))
        shift = shift if self.shifts else np.zeros(3)  # drawn anyway: other changes are the same then
        return create_translate(3, shift) @ np.linalg.inv(to_mm) @ turn @ to_mm

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        image, labels = data["image"], data["labels"]
        matrix = self.randomize(image.shape[1:])
        if matrix is None:
            return dict(data)
        from_fill = (image - self.fill)[None]  # grid_sample fills with 0
        source = labels[None].to(torch.float32)
        moved, moved_labels = torch.empty_like(image), torch.empty_like(labels)
        depth, height, width = image.shape[1:]
        planes = max(1, device_augmentation.SLAB_VOXELS // (height * width))
        for start in range(0, depth, planes):
            rows = slice(start, min(depth, start + planes))
            slab = (rows.stop - rows.start, height, width)
            theta = torch.from_numpy(normalised(matrix, (depth, height, width), slab, start))
            grid = affine_grid(theta[None].to(image), [1, 1, *slab], align_corners=False)
            moved[:, rows] = grid_sample(from_fill, grid, align_corners=False)[0]
            moved_labels[:, rows] = grid_sample(source, grid, mode="nearest", align_corners=False)[0]
        return {**data, "image": moved.add_(self.fill), "labels": moved_labels}


def _plain(tensor: Any) -> torch.Tensor:
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


class RandomMirrorD(Randomizable, MapTransform):
    """Mirrors every second volume along its first axis, left to right in RAS+, and exchanges `pairs`.

    "image": (C, D, H, W), "labels": (1, D, H, W) of any integer type; other classes stay as they are.
    """

    def __init__(self, pairs: Pairs) -> None:
        MapTransform.__init__(self, ("image", "labels"))
        self.pairs = pairs

    def randomize(self, data: object = None) -> bool:
        """Whether this volume is mirrored."""
        return bool(self.R.random() < 0.5)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        if not self.randomize():
            return dict(data)
        image, labels = (data[key].flip(1) for key in ("image", "labels"))
        exchange(labels[0], self.pairs)
        return {**data, "image": image, "labels": labels}
