"""A phantom from head to foot: trunk, bowel, organs, and what a scanner makes of them."""

from collections.abc import Sequence

import numpy as np

from effseg.errors import InputError
from effseg.phantom.organs import HU, ORGANS
from effseg.phantom.torso import Torso, lay_down, smooth_field


def generate(shape: Sequence[int] = (64, 48, 48), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw one phantom.

    The seed alone sets the anatomy: the same seed at another shape is the same body, seen at another voxel
    size (thin glands excepted: they keep 1.5 voxels). Needs about 60 bytes of memory per voxel.

    Args:
        shape: voxels along R, A and S, at least 8 each; voxels are cubes of `spacing(shape)` mm.
        seed: any non-negative integer.

    Returns:
        image (X, Y, Z) int16 in HU, and labels (X, Y, Z) uint8, 0 = background, else an index of `NAMES`.

    Raises:
        InputError: not three lengths of 8 or more, or a negative seed.
    """
    shape = tuple(int(length) for length in shape)
    if len(shape) != 3 or min(shape) < 8:
        raise InputError(f"shape: expected three lengths of at least 8 voxels, got {shape}")
    if seed < 0:
        raise InputError(f"seed: expected a non-negative integer, got {seed}")
    pose, anatomy, scanner = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3))
    torso = lay_down(shape, anatomy, pose)
    _paint_trunk(torso)
    _paint_bowel(torso)
    _paint_organs(torso)
    return _acquire(torso, scanner), torso.labels


def _paint_trunk(torso: Torso) -> None:
    """Fat, body wall with ribs, arms, back muscles, spine and lungs; leaves the cavity for the organs."""
    image, rng = torso.image, torso.rng
    inner = torso.disc(0.78, 0.50)
    wall = torso.disc(0.81, 0.53) & ~inner
    image[torso.disc(0.86, 0.58)] = HU["fat"]
    image[wall] = HU["muscle"]
    for side in (1, -1):
        if rng.random() < 0.6:
            arm = torso.column(side * rng.uniform(0.90, 0.97), -rng.uniform(-0.1, 0.2), 0.10)
            image[arm] = HU["muscle"]
            image[arm & torso.column(side * 0.93, -0.05, 0.03)] = HU["bone"]
        image[torso.column(side * 0.17, -0.36, 0.12)] = HU["muscle"]
    ribs = (np.sin(22 * torso.superior - 3 * torso.anterior) > 0.75) & (torso.superior > 0)
    image[wall & ribs] = HU["bone"]
    spine = torso.column(0, -0.28, 0.11)
    image[spine] = HU["vertebra"]
    image[spine & (np.sin(25 * torso.superior) > 0.8)] = HU["muscle"]
    torso.cavity = inner & ~spine
    diaphragm = 0.52 + 0.12 * np.cos(5 * torso.right) * np.cos(5 * torso.anterior)
    image[torso.cavity & (torso.superior > diaphragm) & (np.abs(torso.right) > 0.1)] = HU["lung"]


def _paint_bowel(torso: Torso) -> None:
    """Unlabelled loops, some with the HU of the kidneys or of the liver."""
    rng = torso.rng
    for _ in range(rng.integers(7, 13)):
        centre = rng.uniform((-0.6, -0.12, -0.7), (0.6, 0.38, 0.15))
        radii = rng.uniform((0.07, 0.06, 0.07), (0.15, 0.11, 0.17))
        loop, _ = torso.blob(centre, radii, tilt=rng.uniform(-1, 1, 3))
        tissue = rng.choice(["kidney", "parenchyma", "bowel wall", "bowel gas"])
        torso.image[loop & torso.cavity] = HU[str(tissue)]


def _paint_organs(torso: Torso) -> None:
    for value, organ in enumerate(ORGANS, start=1):
        mask = organ.draw(torso) & torso.cavity
        torso.image[mask] = HU[organ.tissue]
        torso.labels[mask] = value


def _acquire(torso: Torso, rng: np.random.Generator) -> np.ndarray:
    """What a scanner makes of it: contrast phase, texture, partial volume, bias and noise; int16 HU."""
    from scipy.ndimage import gaussian_filter

    image = torso.image
    enhanced = (image > 60) & (image < 300)
    image[enhanced] = 50 + (image[enhanced] - 50) * rng.uniform(0.75, 1.2)
    texture = gaussian_filter(rng.standard_normal(image.shape, np.float32), 1.0)
    image += np.where(image > -200, texture * (8.0 / texture.std()), 0)
    image = gaussian_filter(image, 0.45)
    image += 10.0 * smooth_field(rng, image.shape, torso.voxel, 0.5)
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(18, 32))
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)
