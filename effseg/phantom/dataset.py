"""Phantoms as a dataset on disk."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effseg.common.atomic import atomic_path
from effseg.errors import InputError
from effseg.phantom.body import generate
from effseg.phantom.organs import NAMES
from effseg.phantom.torso import spacing


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
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
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
