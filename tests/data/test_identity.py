"""What tells whether a case's files are still the same."""

import nibabel as nib
import numpy as np
import pytest

from effseg.data.cases import Case
from effseg.data.identity import case_identity


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_any_voxel_counts(tmp_path, ending):
    """Of a file that is larger than the blocks that are looked at."""
    path = tmp_path / f"scan{ending}"
    voxels = np.random.default_rng(0).integers(0, 1000, (64, 64, 64), dtype=np.int16)
    found = []
    for place in (None, 5_000, 100_001, 262_143):
        changed = voxels.copy()
        if place is not None:
            changed.ravel()[place] += 1
        nib.save(nib.Nifti1Image(changed, np.eye(4)), path)
        found.append(str(case_identity(Case("scan", (path,)))))
    assert len(set(found)) == len(found)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"copy{ending}")
    assert str(case_identity(Case("copy", (tmp_path / f"copy{ending}",)))) == found[0]
