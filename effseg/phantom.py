"""CT-like torso phantoms: HU volumes with label maps, for demonstrations and tests without patients.

Every phantom is another body: organs, body wall, bowel and arms are drawn with random size, place and tilt,
the whole body is shifted, scaled and smoothly deformed; contrast phase, texture, bias and noise vary.
Organs come in pairs that look alike and are told apart by position only: right and left kidney, right and
left adrenal gland, aorta and inferior vena cava, liver and spleen share HU, texture and shape prior. Bowel
loops with the kidneys' or the liver's HU carry no label. So a network must see the whole body.

Axes are RAS+: the first index grows to the patient's right, the second to anterior, the third to superior.
Body units: the torso is about 1.7 wide, 1.15 deep and 1.5 long; one unit is `MM_PER_UNIT` mm.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from effseg.atomic import atomic_path
from effseg.errors import InputError

MM_PER_UNIT = 176.0
FIELD_OF_VIEW = (2.0, 1.5, 1.5)  # body units that every volume shows at least, along R, A, S

HU = {
    "air": -1000,
    "lung": -800,
    "bowel gas": -400,
    "fat": -100,
    "urine": 10,
    "bowel wall": 20,
    "muscle": 55,
    "adrenal gland": 85,
    "pancreas": 95,
    "parenchyma": 110,
    "vessel": 150,
    "kidney": 180,
    "vertebra": 270,
    "bone": 450,
}

Mask = np.ndarray
Vector = tuple[float, float, float]


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


# --------------------------------------------------------------------------------------------- organs


Draw = Callable[[Torso], Mask]


@dataclass(frozen=True)
class Organ:
    name: str
    tissue: str  # key of HU
    draw: Draw


def _at(centre: Vector, radii: Vector, power: float = 2.0, tilt: Vector = (0, 0, 0)) -> Draw:
    """A solid organ at this place; its shape, place and tilt still vary from body to body."""
    return lambda torso: torso.blob(centre, radii, power=power, tilt=tilt)[0]


def _pancreas(torso: Torso) -> Mask:
    """A thin bent rod from the duodenum on the right, rising to the spleen on the left."""
    forward, up = torso.rng.uniform(-0.03, 0.03, 2)
    along = (0.25 - torso.right) / 0.65
    axis_anterior = -(0.02 + 0.10 * np.sin(3 * along) + forward)
    axis_superior = 0.05 + 0.12 * along + up
    away = (torso.anterior - axis_anterior) ** 2 + (torso.superior - axis_superior) ** 2
    return (away < (0.065 * (1 - 0.3 * along)) ** 2) & (along > 0) & (along < 1)


def _kidney(torso: Torso, side: int) -> Mask:
    """A bean: an ellipsoid without its hilum. `side` is +1 for right, -1 for left; both drawn alike."""
    middle, radii = (side * 0.36, -0.20, -0.06), (0.135, 0.115, 0.23)
    bean, centre = torso.blob(middle, radii, tilt=(0, side * 0.2, 0), wander=0.05)
    inward = centre - (side * 0.10, -0.03, 0)
    hilum, _ = torso.blob(inward, (0.06, 0.05, 0.09), wander=0.01)
    torso.centres[f"kidney {side}"] = centre
    return bean & ~hilum


def _adrenal(torso: Torso, side: int) -> Mask:
    """A thin inverted V on top of the kidney, about one and a half voxels thick at least."""
    kidney = torso.centres[f"kidney {side}"]
    thickness = max(0.020, 0.75 * torso.voxel)
    across = torso.right - (kidney[0] - side * 0.12)
    deep = torso.anterior - (kidney[1] + 0.07)
    up = torso.superior - (kidney[2] + 0.25)
    limbs = np.abs(np.abs(across) - (0.01 + 0.35 * np.clip(0.08 - up, 0, 1))) < thickness
    return limbs & (np.abs(deep) < 0.08) & (np.abs(up) < 0.09)


def _vessel(torso: Torso, side: int) -> Mask:
    """Aorta (left of the midline) or inferior vena cava (right): same calibre, gently winding."""
    if "calibre" not in torso.centres:
        torso.centres["calibre"] = torso.rng.uniform(0.058, 0.075, 1)
    aside = side * 0.085 + torso.rng.uniform(-0.04, 0.04)
    phase = torso.rng.uniform(0, 1)
    right = aside + 0.03 * np.sin(4 * torso.superior + phase)
    anterior = -(0.11 + 0.02 * np.cos(3 * torso.superior))
    return torso.column(right, anterior, torso.centres["calibre"][0]) & (torso.superior > -0.5)


# In the order they are painted: later ones lie on top of earlier ones. Class = place in the table + 1.
ORGANS = (
    Organ("liver", "parenchyma", _at((0.38, 0.02, 0.30), (0.38, 0.34, 0.30), 2.3, (0, -0.25, 0))),
    Organ("spleen", "parenchyma", _at((-0.56, -0.16, 0.32), (0.15, 0.20, 0.24), 2.2, (-0.1, 0.3, 0.1))),
    Organ("pancreas", "pancreas", _pancreas),
    Organ("kidney_right", "kidney", partial(_kidney, side=1)),
    Organ("kidney_left", "kidney", partial(_kidney, side=-1)),
    Organ("adrenal_gland_right", "adrenal gland", partial(_adrenal, side=1)),
    Organ("adrenal_gland_left", "adrenal gland", partial(_adrenal, side=-1)),
    Organ("aorta", "vessel", partial(_vessel, side=-1)),
    Organ("inferior_vena_cava", "vessel", partial(_vessel, side=1)),
    Organ("urinary_bladder", "urine", _at((0, 0.08, -0.66), (0.20, 0.16, 0.13))),
)
NAMES = ("background", *(organ.name for organ in ORGANS))


# ------------------------------------------------------------------------------------------- the body


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
    image += 10.0 * _smooth_field(rng, image.shape, torso.voxel, 0.5)
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(18, 32))
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


# ----------------------------------------------------------------------------------------- geometry


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


def _smooth_field(
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


def _lay_down(shape: tuple[int, ...], anatomy: np.random.Generator, pose: np.random.Generator) -> Torso:
    """An empty body in a random pose: shifted, scaled and smoothly deformed coordinates."""
    voxel = _voxel(shape)
    shift = pose.uniform((-0.10, -0.06, -0.08), (0.10, 0.06, 0.08))
    scale = pose.uniform(0.86, 1.06) * np.array([1, pose.uniform(0.93, 1.07), pose.uniform(0.93, 1.07)])
    axes = np.meshgrid(*(_positions(length, voxel) for length in shape), indexing="ij")
    right, anterior, superior = (
        (axis + 0.025 * _smooth_field(pose, shape, voxel, 0.48) - np.float32(offset)) / np.float32(size)
        for axis, offset, size in zip(axes, shift, scale, strict=True)
    )
    return Torso(
        right,
        anterior,
        superior,
        voxel=voxel / float(scale.mean()),
        rng=anatomy,
        image=np.full(shape, HU["air"], np.float32),
        labels=np.zeros(shape, np.uint8),
    )


# ------------------------------------------------------------------------------------------ public


def spacing(shape: Sequence[int]) -> float:
    """Edge in mm of the cubic voxels of a phantom of this shape: 5.5 at (64, 48, 48), 0.7 at 512x512x512."""
    return _voxel(shape) * MM_PER_UNIT


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
    torso = _lay_down(shape, anatomy, pose)
    _paint_trunk(torso)
    _paint_bowel(torso)
    _paint_organs(torso)
    return _acquire(torso, scanner), torso.labels


def write_dataset(
    folder: str | os.PathLike[str],
    cases: int,
    shape: Sequence[int] = (64, 48, 48),
    seed: int = 0,
    unseen: int = 1,
) -> Path:
    """Write phantoms as a dataset in nnU-Net's layout.

    ``imagesTr/phantom_000_0000.nii.gz`` with ``labelsTr/phantom_000.nii.gz`` for `cases` training cases,
    ``imagesTs`` and ``labelsTs`` for `unseen` more, and ``dataset.json``. Case number n is
    ``generate(shape, seed + n)``, unseen ones follow the training ones. NIfTI affine RAS, in mm, centred.

    Returns the folder. Raises InputError as `generate` does, and for fewer than one training case.
    """
    if cases < 1 or unseen < 0:
        raise InputError(f"cases: expected at least 1 (and 0 unseen), got {cases} and {unseen} unseen")
    folder = Path(folder)
    for number in range(cases + unseen):
        split = "Tr" if number < cases else "Ts"
        image, labels = generate(shape, seed + number)
        _write_nifti(folder / f"images{split}" / f"phantom_{number:03d}_0000.nii.gz", image)
        _write_nifti(folder / f"labels{split}" / f"phantom_{number:03d}.nii.gz", labels)
    description = {
        "channel_names": {"0": "CT"},
        "labels": {name: value for value, name in enumerate(NAMES)},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        "description": f"effseg phantoms {'x'.join(map(str, shape))}, seed {seed}",
    }
    with atomic_path(folder / "dataset.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n")
    return folder


def _write_nifti(path: Path, array: np.ndarray) -> None:
    import nibabel as nib

    edge = spacing(array.shape)
    affine = np.diag([edge, edge, edge, 1.0])
    affine[:3, 3] = -edge * (np.array(array.shape) - 1) / 2
    volume = nib.Nifti1Image(array, affine)
    volume.header.set_xyzt_units("mm")
    volume.set_sform(affine, code="scanner")
    volume.set_qform(affine, code="scanner")
    with atomic_path(path) as temporary:
        nib.save(volume, temporary)
