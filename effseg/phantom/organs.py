"""The organs of a phantom: one table, and the shapes that it names."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from effseg.phantom.torso import Mask, Torso

HU = {
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

Vector = tuple[float, float, float]
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
