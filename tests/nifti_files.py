"""Small NIfTI files, and headers changed past every check."""

from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (3, 4, 5)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **header: float) -> Path:
    image = nib.Nifti1Image(array, np.diag([1.5, 2.0, 3.0, 1.0]) if affine is None else affine)
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    nib.save(image, path)
    if header:
        patch_header(path, **header)
    return path


def patch_header(path: Path, **values: object) -> None:
    """Set raw header fields in an uncompressed file, past every check of nibabel."""
    header = nib.Nifti1Header(path.read_bytes()[:348], check=False)
    for name, value in values.items():
        header[name] = value
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])
