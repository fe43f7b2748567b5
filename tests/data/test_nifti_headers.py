"""What the NIfTI standard says of headers that are at its edge."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_files import SHAPE, patch_header, save

from effseg.data.nifti import read_image, read_labels, write_labels
from effseg.errors import InputError, InputWarning


class TestHeaders:
    """What the standard says of headers that are at its edge."""

    def qform(self, path: Path, affine: np.ndarray) -> Path:
        image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(SHAPE), affine)
        image.set_sform(None, 0)
        image.set_qform(affine, 1)
        nib.save(image, path)
        return path

    @pytest.mark.parametrize("excess", [3e-7, 1e-6, 5e-5])
    def test_a_quaternion_longer_than_1_by_rounding(self, tmp_path: Path, excess: float) -> None:
        affine = np.diag([2.0, -3.0, -4.0, 1.0])
        path = self.qform(tmp_path / "scan.nii", affine)
        patch_header(path, quatern_b=np.sqrt(1 + excess), quatern_c=0, quatern_d=0)
        scan = read_image(path)
        np.testing.assert_allclose(scan.grid.affine, affine, atol=1e-5)
        write_labels(tmp_path / "labels.nii", np.ones(SHAPE, np.uint8), scan.grid)
        np.testing.assert_allclose(nib.load(tmp_path / "labels.nii").affine, affine, atol=1e-5)

    @pytest.mark.parametrize("length", [1.01, 3.0, np.nan, np.inf])
    def test_a_quaternion_that_is_none(self, tmp_path: Path, length: float) -> None:
        path = self.qform(tmp_path / "scan.nii", np.diag([2.0, -3.0, -4.0, 1.0]))
        patch_header(path, quatern_b=length)
        with pytest.raises(InputError, match=r"expected a qform quaternion \(b, c, d\) no longer than 1"):
            read_image(path)

    @pytest.mark.parametrize(("stored", "sign"), [(0, 1), (1, 1), (-1, -1)])
    def test_the_qforms_direction(self, tmp_path: Path, stored: float, sign: int) -> None:
        path = self.qform(tmp_path / "scan.nii", np.diag([2.0, 3.0, 4.0, 1.0]))
        patch_header(path, pixdim=[stored, 2, 3, 4, 1, 1, 1, 1])
        np.testing.assert_allclose(read_image(path).grid.affine, np.diag([2.0, 3.0, sign * 4.0, 1.0]))

    def test_another_direction(self, tmp_path: Path) -> None:
        path = self.qform(tmp_path / "scan.nii", np.diag([2.0, 3.0, 4.0, 1.0]))
        patch_header(path, pixdim=[-0.5, 2, 3, 4, 1, 1, 1, 1])
        with pytest.raises(InputError, match=r"expected 1, -1 or 0 as pixdim\[0\], found -0\.5"):
            read_image(path)

    def test_voxel_sizes_have_no_sign(self, tmp_path: Path) -> None:
        path = self.qform(tmp_path / "scan.nii", np.diag([2.0, 3.0, 4.0, 1.0]))
        patch_header(path, pixdim=[1, -2, 3, -4, 1, 1, 1, 1])
        np.testing.assert_allclose(read_image(path).grid.affine, np.diag([2.0, 3.0, 4.0, 1.0]))

    @pytest.mark.parametrize("code", [0, -1, -32768])
    def test_without_an_orientation_nibabels_is_taken_and_said(self, tmp_path: Path, code: int) -> None:
        path = self.qform(tmp_path / "scan.nii", np.diag([2.0, 3.0, 4.0, 1.0]))
        patch_header(path, qform_code=code, sform_code=code)
        with pytest.warns(InputWarning, match=r"scan\.nii: its header does not say how the patient lies"):
            scan = read_image(path)
        patch_header(path, qform_code=0, sform_code=0)
        np.testing.assert_allclose(scan.grid.affine, nib.load(path).affine)
        assert scan.spacing == (2.0, 3.0, 4.0)
        read_labels(path, scan)  # says nothing again

    def test_an_unknown_code(self, tmp_path: Path) -> None:
        path = self.qform(tmp_path / "scan.nii", np.eye(4))
        patch_header(path, sform_code=9)
        with pytest.raises(InputError, match="expected a sform_code from 0 to 5, found 9"):
            read_image(path)

    def test_an_unknown_datatype(self, tmp_path: Path) -> None:
        path = self.qform(tmp_path / "scan.nii", np.eye(4))
        patch_header(path, datatype=32767)
        with pytest.raises(InputError, match="found the unknown datatype 32767"):
            read_image(path)

    @pytest.mark.parametrize("qform", [True, False])
    @pytest.mark.parametrize(("unit", "factor"), [(1, 1000.0), (2, 1.0), (3, 0.001), (0, 1.0)])
    def test_units_become_mm(self, tmp_path: Path, unit: int, factor: float, qform: bool) -> None:
        """With the bits of the fourth axis's unit, seconds here, beside them."""
        affine = np.array([[2.0, 0, 0, -5], [0, -3, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1]])
        if qform:
            path = self.qform(tmp_path / "scan.nii", affine)
        else:
            path = save(tmp_path / "scan.nii", np.arange(60, dtype=np.int16).reshape(SHAPE), affine)
        patch_header(path, xyzt_units=unit + 8)
        scan = read_image(path)
        scaled = affine * factor
        scaled[3, 3] = 1
        np.testing.assert_allclose(scan.grid.affine, scaled, rtol=1e-6)
        write_labels(tmp_path / "labels.nii", np.ones(SHAPE, np.uint8), scan.grid)
        written = nib.load(tmp_path / "labels.nii")
        np.testing.assert_allclose(written.affine, scaled, rtol=1e-6)
        np.testing.assert_allclose(written.header.get_zooms(), np.array([2, 3, 4]) * factor, rtol=1e-6)
        assert int(written.header["xyzt_units"]) == (10 if unit else 8)
        read_labels(tmp_path / "labels.nii", scan)

    def test_a_size_that_overflows_in_mm(self, tmp_path: Path) -> None:
        path = save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16))
        patch_header(path, xyzt_units=1, pixdim=[1, 3e38, 1, 1, 1, 1, 1, 1], srow_x=[3e38, 0, 0, 0])
        with pytest.raises(InputError, match="expected positive voxel sizes in mm"):
            read_image(path)

    def test_a_pixdim_that_is_not_the_sforms(self, tmp_path: Path) -> None:
        path = save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16), np.diag([1.0, 1.0, 1.0, 1.0]))
        patch_header(path, pixdim=[1, 1, 1, 3, 1, 1, 1, 1])
        with pytest.warns(
            InputWarning, match="1 x 1 x 1 mm by its sform and 1 x 1 x 3 mm by its pixdim: the"
        ):
            assert read_image(path).spacing == (1.0, 1.0, 1.0)

    def test_a_qform_that_turns_elsewhere(self, tmp_path: Path) -> None:
        image = nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4))
        image.set_sform(np.eye(4), 1)
        image.set_qform(np.diag([-1.0, -1.0, 1.0, 1.0]), 1)
        nib.save(image, tmp_path / "scan.nii")
        with pytest.warns(
            InputWarning, match="its axes go elsewhere by its sform than by its qform: the sform"
        ):
            np.testing.assert_array_equal(read_image(tmp_path / "scan.nii").grid.affine, np.eye(4))

    @pytest.mark.parametrize(("slope", "inter"), [(0, 7), (np.nan, 7), (np.inf, 7), (0, np.nan)])
    def test_no_scaling(self, tmp_path: Path, slope: float, inter: float) -> None:
        path = self.qform(tmp_path / "scan.nii", np.eye(4))
        patch_header(path, scl_slope=slope, scl_inter=inter)
        np.testing.assert_array_equal(read_image(path).array[0], np.arange(60).reshape(SHAPE))
