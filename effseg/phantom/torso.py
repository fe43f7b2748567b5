"""Space of a phantom: body coordinates of every voxel, shapes in them, smooth random fields.

Body units: the torso is about 1.7 wide, 1.15 deep and 1.5 long; one unit is `MM_PER_UNIT` mm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MM_PER_UNIT = 176.0
FIELD_OF_VIEW = (2.0, 1.5, 1.5)  # body units that every volume shows at least, along R, A, S
AIR = -1000.0  # HU

Mask = np.ndarray


@dataclass
class Torso:
    """One body being drawn: deformed coordinates of every voxel, what was painted so far."""

    right: np.ndarray  # (X, Y, Z) float32, body units
    anterior: np.ndarray
    superior: np.ndarray
    voxel: float  # edge of a voxel in body units
    rng: np.random.Generator
    image: np.ndarray  # (X, Y, Z) float32 HU
    labels: np.ndarray  # (X, Y, Z) uint8
    cavity: Mask = field(init=False)  # where organs may lie: inside the body wall, outside the spine
    centres: dict[str, np.ndarray] = field(default_factory=dict)  # organs that place their neighbours

    def disc(self, right: float, anterior: float, power: float = 2.4) -> Mask:
        """Inside of a superellipse around the body's axis with these half axes."""
        return np.abs(self.right / right) ** power + np.abs(self.anterior / anterior) ** power < 1

    def column(self, right: float | np.ndarray, anterior: float | np.ndarray, radius: float) -> Mask:
        """Inside of a vertical tube; its axis may wander with height."""
        return (self.right - right) ** 2 + (self.anterior - anterior) ** 2 < radius * radius

    def blob(
        self,
        centre: Sequence[float] | np.ndarray,
        radii: Sequence[float] | np.ndarray,
        *,
        power: float = 2.0,
        tilt: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0),
        wander: float = 0.03,
        growth: float = 0.12,
    ) -> tuple[Mask, np.ndarray]:
        """Inside of a tilted superellipsoid, and its centre after random shift, growth and tilt (radians)."""
        place = np.asarray(centre) + self.rng.uniform(-wander, wander, 3)
        size = np.asarray(radii) * self.rng.uniform(1 - growth, 1 + growth, 3)
        axes = _rotation(np.asarray(tilt) + self.rng.uniform(-0.2, 0.2, 3)).astype(np.float32)
        offset = (self.right - place[0], self.anterior - place[1], self.superior - place[2])
        distance = np.zeros_like(self.right)
        for axis, radius in zip(axes.T, size, strict=True):
            along = axis[0] * offset[0] + axis[1] * offset[1] + axis[2] * offset[2]
            distance += np.abs(along / np.float32(radius)) ** power
        return distance < 1, place


def spacing(shape: Sequence[int]) -> float:
    """Edge in mm of the cubic voxels of a phantom of this shape: 5.5 at (64, 48, 48), 0.7 at 512x512x512."""
    return _voxel(shape) * MM_PER_UNIT


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation about R, then A, then S, by angles in radians; (3, 3)."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    about_r = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_a = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_s = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return about_s @ about_a @ about_r


def _positions(length: int, voxel: float) -> np.ndarray:
    """Coordinates of the voxels' centres along an axis whose middle is 0; body units, float32."""
    return ((np.arange(length) - (length - 1) / 2) * voxel).astype(np.float32)


def smooth_field(
    rng: np.random.Generator, shape: tuple[int, ...], voxel: float, wavelength: float
) -> np.ndarray:
    """Smooth random field of standard deviation about 1: Gaussian bumps on a coarse grid, `wavelength` wide.

    The grid covers the field of view in body units, whatever the shape: the same draws give the same field
    on a finer volume. Separable, so it costs little at any size.
    """
    bases = []
    for length, extent in zip(shape, FIELD_OF_VIEW, strict=True):
        knots = np.arange(-extent / 2 - wavelength, extent / 2 + 1.5 * wavelength, wavelength)
        bases.append(np.exp(-2 * ((_positions(length, voxel)[:, None] - knots) / wavelength) ** 2))
    heights = rng.standard_normal(tuple(base.shape[1] for base in bases))
    field_ = np.einsum("xi,yj,zk,ijk->xyz", *bases, heights, optimize=True)
    return (field_ / np.prod([np.sqrt((base**2).sum(1).mean()) for base in bases])).astype(np.float32)


def _voxel(shape: Sequence[int]) -> float:
    """Edge of the cubic voxels, body units, with which a volume of this shape shows the whole torso."""
    return max(extent / length for extent, length in zip(FIELD_OF_VIEW, shape, strict=True))


def lay_down(shape: tuple[int, ...], anatomy: np.random.Generator, pose: np.random.Generator) -> Torso:
    """An empty body in a random pose: shifted, scaled and smoothly deformed coordinates."""
    voxel = _voxel(shape)
    shift = pose.uniform((-0.10, -0.06, -0.08), (0.10, 0.06, 0.08))
    scale = pose.uniform(0.86, 1.06) * np.array([1, pose.uniform(0.93, 1.07), pose.uniform(0.93, 1.07)])
    axes = np.meshgrid(*(_positions(length, voxel) for length in shape), indexing="ij")
    right, anterior, superior = (
        (axis + 0.025 * smooth_field(pose, shape, voxel, 0.48) - np.float32(offset)) / np.float32(size)
        for axis, offset, size in zip(axes, shift, scale, strict=True)
    )
    return Torso(
        right,
        anterior,
        superior,
        voxel=voxel / float(scale.mean()),
        rng=anatomy,
        image=np.full(shape, AIR, np.float32),
        labels=np.zeros(shape, np.uint8),
    )
