"""Reading and writing NIfTI: orientation, scaling, exact round trips, bad files."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import inv_ornt_aff, ornt2axcodes, ornt_transform
from nifti_files import SHAPE, patch_header, save

from effseg.data import nifti
from effseg.data.nifti import read_image, read_labels, write_labels
from effseg.errors import InputError

ORIENTATIONS = [
    np.array([[axis, sign] for axis, sign in zip(axes, signs, strict=True)])
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def rotation(x: float, y: float, z: float) -> np.ndarray:
    matrices = []
    for axis, angle in enumerate((x, y, z)):
        matrix = np.eye(4)
        i, j = [other for other in range(3) if other != axis]
        matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrices.append(matrix)
    return matrices[0] @ matrices[1] @ matrices[2]


class TestOrientation:
    @pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: "".join(ornt2axcodes(o)))
    def test_every_order_of_axes_reads_as_ras(self, tmp_path: Path, orientation: np.ndarray) -> None:
        rng = np.random.default_rng(0)
        ras = rng.integers(-1000, 3000, SHAPE).astype(np.int16)
        affine = np.diag([1.5, 2.0, 3.0, 1.0])
        affine[:3, 3] = -7, 11, 13
        image = nib.Nifti1Image(ras, affine).as_reoriented(
            ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), orientation)
        )
        nib.save(image, tmp_path / "scan.nii")
        scan = read_image(tmp_path / "scan.nii")
        np.testing.assert_array_equal(scan.array, ras[None])
        np.testing.assert_allclose(scan.grid.ras_affine, affine)
        np.testing.assert_allclose(scan.spacing, (1.5, 2.0, 3.0))

    @pytest.mark.filterwarnings("ignore:.*does not say how the patient lies")
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        orientation=st.sampled_from(ORIENTATIONS),
        angles=st.tuples(*[st.floats(-0.7, 0.7)] * 3),
        shape=st.tuples(*[st.integers(1, 6)] * 3),
        codes=st.sampled_from([(0, 0), (0, 1), (1, 0), (1, 1), (2, 4), (3, 0)]),
        seed=st.integers(0, 2**16),
        suffix=st.sampled_from([".nii", ".nii.gz"]),
        values=st.sampled_from([200, 60000]),
    )
    def test_labels_come_back_exactly(
        self,
        tmp_path: Path,
        orientation: np.ndarray,
        angles: tuple[float, float, float],
        shape: tuple[int, int, int],
        codes: tuple[int, int],
        seed: int,
        suffix: str,
        values: int,
    ) -> None:
        rng = np.random.default_rng(seed)
        affine = rotation(*angles) @ np.diag([*rng.uniform(0.5, 5, 3), 1]) @ inv_ornt_aff(orientation, shape)
        affine[:3, 3] = rng.uniform(-300, 300, 3)
        image = nib.Nifti1Image(rng.integers(-1000, 1000, shape).astype(np.int16), affine)
        image.set_sform(affine, codes[1])
        image.set_qform(affine, codes[0])
        source, target = tmp_path / f"scan{suffix}", tmp_path / f"labels{suffix}"
        nib.save(image, source)

        scan = read_image(source)
        labels = rng.integers(0, values, scan.array.shape[1:]).astype(np.uint16)
        write_labels(target, labels, scan.grid)

        np.testing.assert_array_equal(read_labels(target, scan), labels)
        before, after = nib.load(source), nib.load(target)
        assert after.shape == before.shape
        np.testing.assert_array_equal(after.affine, before.affine)
        for name in ("pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b",
                     "quatern_c", "quatern_d", "qoffset_x", "xyzt_units", "dim"):  # fmt: skip
            np.testing.assert_array_equal(after.header[name], before.header[name], err_msg=name)
        np.testing.assert_array_equal(scan.grid.to_ras(np.asarray(after.dataobj)), labels)

    def test_an_oblique_grid_goes_to_the_closest_axes(self, tmp_path: Path) -> None:
        affine = rotation(0.3, -0.2, 0.25) @ np.diag([-1.0, 2.0, -3.0, 1.0])
        array = np.arange(60, dtype=np.int16).reshape(SHAPE)
        scan = read_image(save(tmp_path / "scan.nii", array, affine))
        closest = nib.as_closest_canonical(nib.load(tmp_path / "scan.nii"))
        np.testing.assert_array_equal(scan.array[0], np.asarray(closest.dataobj))
        np.testing.assert_allclose(scan.grid.ras_affine, closest.affine)

    def test_nifti_2_stays_nifti_2(self, tmp_path: Path) -> None:
        image = nib.Nifti2Image(np.zeros(SHAPE, np.int16), np.diag([2.0, 2, 2, 1]))
        nib.save(image, tmp_path / "scan.nii.gz")
        scan = read_image(tmp_path / "scan.nii.gz")
        write_labels(tmp_path / "labels.nii.gz", np.ones(SHAPE, np.uint8), scan.grid)
        assert isinstance(nib.load(tmp_path / "labels.nii.gz"), nib.Nifti2Image)


class TestVoxels:
    @pytest.mark.parametrize(
        ("stored", "slope", "inter", "expected"),
        [
            (np.array([0, 1, 4095], np.uint16), 1, -1024, np.array([-1024, -1023, 3071], np.int16)),
            (np.array([-3, 7, 9], np.int8), 1, 0, np.array([-3, 7, 9], np.int16)),
            (np.array([0, 65535, 1], np.uint16), 1, 0, np.array([0, 65535, 1], np.float32)),
            (np.array([0, 1, 3], np.int16), 0.5, 0, np.array([0, 0.5, 1.5], np.float32)),
            (np.array([-1000, 40, 3000], np.float64), 1, 0, np.array([-1000, 40, 3000], np.int16)),
            (np.array([0.25, 40, 1e6], np.float32), 1, 0, np.array([0.25, 40, 1e6], np.float32)),
            (np.array([1, 2, 70000], np.int32), 1, 0, np.array([1, 2, 70000], np.float32)),
            (np.array([-5, 2, 7], ">i2"), 1, 0, np.array([-5, 2, 7], np.int16)),
        ],
    )
    def test_scaling_and_types(
        self, tmp_path: Path, stored: np.ndarray, slope: float, inter: float, expected: np.ndarray
    ) -> None:
        header = nib.Nifti1Header(endianness=">" if stored.dtype.byteorder == ">" else "<")
        image = nib.Nifti1Image(stored.reshape(3, 1, 1), np.eye(4), header, dtype=stored.dtype)
        nib.save(image, tmp_path / "scan.nii")
        raw = bytearray((tmp_path / "scan.nii").read_bytes())
        stored_header = nib.Nifti1Header(bytes(raw[:348]), check=False)
        stored_header["scl_slope"], stored_header["scl_inter"] = slope, inter
        (tmp_path / "scan.nii").write_bytes(stored_header.binaryblock + bytes(raw[348:]))
        array = read_image(tmp_path / "scan.nii").array
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array.ravel(), expected)

    def test_a_trailing_axis_of_one_is_dropped_and_comes_back(self, tmp_path: Path) -> None:
        scan = read_image(save(tmp_path / "scan.nii", np.zeros((*SHAPE, 1), np.int16)))
        assert scan.array.shape == (1, *SHAPE)
        labels = np.arange(60, dtype=np.uint8).reshape(SHAPE)
        write_labels(tmp_path / "labels.nii", labels, scan.grid)
        assert nib.load(tmp_path / "labels.nii").shape == (*SHAPE, 1)
        np.testing.assert_array_equal(read_labels(tmp_path / "labels.nii", scan), labels)

    def test_channels(self, tmp_path: Path) -> None:
        first = save(tmp_path / "a.nii", np.full(SHAPE, 3, np.int16))
        second = save(tmp_path / "b.nii", np.full(SHAPE, 0.5, np.float32))
        scan = read_image([first, second])
        assert scan.array.shape == (2, *SHAPE)
        assert scan.array.dtype == np.float32
        np.testing.assert_array_equal(scan.array[:, 0, 0, 0], (3, 0.5))
        other = save(tmp_path / "c.nii", np.zeros((3, 4, 6), np.int16))
        with pytest.raises(InputError, match=r"c\.nii: not on the grid of .*a\.nii: shape 3x4x6 against"):
            read_image([first, other])


class TestLabels:
    @pytest.mark.parametrize("value", [-1, 65536, 1.5, np.nan, np.inf])
    def test_what_a_label_file_cannot_hold(self, tmp_path: Path, value: float) -> None:
        """Such as -1 and -100 for voxels to ignore; whole numbers of a float type are labels."""
        scan = read_image(save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16)))
        labels = np.full(SHAPE, 300, np.float32 if isinstance(value, float) else np.int32)
        write_labels(tmp_path / "good.nii", labels, scan.grid)
        assert (read_labels(tmp_path / "good.nii") == 300).all()
        labels[2, 1, 3] = value
        with pytest.raises(InputError, match=f"labels: expected whole numbers .*, found {value:g}"):
            write_labels(tmp_path / "bad.nii", labels, scan.grid)
        assert not (tmp_path / "bad.nii").exists()

    def test_names_are_kept_in_the_header(self, tmp_path: Path) -> None:
        scan = read_image(save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16)))
        write_labels(tmp_path / "labels.nii.gz", np.ones(SHAPE, np.uint8), scan.grid, {1: "Œsophagus"})
        (extension,) = nib.load(tmp_path / "labels.nii.gz").header.extensions
        assert json.loads(extension.text) == {"labels": {"1": "Œsophagus"}}
        np.testing.assert_array_equal(read_labels(tmp_path / "labels.nii.gz", scan), np.ones(SHAPE))

    @pytest.mark.parametrize(("highest", "dtype"), [(255, np.uint8), (256, np.uint16)])
    def test_the_smallest_type_that_holds_them(self, tmp_path: Path, highest: int, dtype: type) -> None:
        scan = read_image(save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16)))
        write_labels(tmp_path / "labels.nii", np.full(SHAPE, highest, np.int32), scan.grid)
        assert nib.load(tmp_path / "labels.nii").get_data_dtype() == dtype
        assert read_labels(tmp_path / "labels.nii").dtype == dtype

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.full(SHAPE, -1, np.int16), r"labels must lie from 0 to 65535, found -1 at voxel \(0, 0, 0\)"),
            (np.full(SHAPE, 1.5, np.float32), "labels must be whole numbers"),
            (np.full(SHAPE, 1e6, np.float32), "labels must lie from 0 to 65535"),
        ],
    )
    def test_values_which_are_no_labels(self, tmp_path: Path, array: np.ndarray, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_labels(save(tmp_path / "labels.nii", array))

    def test_grids_that_differ(self, tmp_path: Path) -> None:
        scan = read_image(save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16)))
        affine = scan.grid.affine.copy()
        affine[0, 3] += 0.5
        moved = save(tmp_path / "moved.nii", np.zeros(SHAPE, np.uint8), affine)
        with pytest.raises(InputError, match=r"moved\.nii: .* grid of .*scan\.nii: .* 0\.5 mm apart"):
            read_labels(moved, scan)
        larger = save(tmp_path / "larger.nii", np.zeros((3, 4, 6), np.uint8))
        with pytest.raises(InputError, match="shape 3x4x6 against 3x4x5"):
            read_labels(larger, scan)

    def test_the_same_grid_in_another_order_of_axes_agrees(self, tmp_path: Path) -> None:
        scan = read_image(save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16)))
        labels = np.arange(60, dtype=np.uint8).reshape(SHAPE)
        image = nib.Nifti1Image(labels, scan.grid.affine + 1e-4 * np.eye(4))
        image = image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
        nib.save(image, tmp_path / "labels.nii")
        np.testing.assert_array_equal(read_labels(tmp_path / "labels.nii", scan), labels)


class TestLabelsFromFloats:
    @pytest.mark.parametrize("stored", [np.uint8, np.uint16, np.int16])
    @pytest.mark.parametrize("highest", [1, 7, 61, 117])
    def test_whole_within_the_steps_of_the_file(self, tmp_path: Path, stored: type, highest: int) -> None:
        labels = np.arange(60).reshape(SHAPE) % (highest + 1)
        labels[0, 0, 0] = highest
        image = nib.Nifti1Image(labels.astype(np.float64), np.eye(4))
        image.set_data_dtype(stored)
        nib.save(image, tmp_path / "labels.nii.gz")
        found = read_labels(tmp_path / "labels.nii.gz")
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, labels)

    @pytest.mark.parametrize(
        ("value", "good"), [(3.0009, True), (2.9991, True), (3.002, False), (2.5, False)]
    )
    def test_of_floats(self, tmp_path: Path, value: float, good: bool) -> None:
        labels = np.zeros(SHAPE, np.float32)
        labels[2, 1, 4] = value
        path = save(tmp_path / "labels.nii", labels)
        if good:
            assert read_labels(path)[2, 1, 4] == 3
        else:
            with pytest.raises(InputError, match=rf"whole numbers, found {value} at voxel \(2, 1, 4\)"):
                read_labels(path)

    def test_probabilities_in_8_bits_are_no_labels(self, tmp_path: Path) -> None:
        image = nib.Nifti1Image(np.linspace(0, 1, 60).reshape(SHAPE), np.eye(4))
        image.set_data_dtype(np.uint8)
        nib.save(image, tmp_path / "labels.nii")
        with pytest.raises(InputError, match=r"whole numbers, found 0\.0862745 at voxel \(0, 1, 0\)"):
            read_labels(tmp_path / "labels.nii")

    def test_where_in_the_files_own_order(self, tmp_path: Path) -> None:
        labels = np.zeros(SHAPE, np.float32)
        labels[2, 3, 1] = np.nan
        path = save(tmp_path / "labels.nii", labels, np.diag([-1.0, -1.0, 1.0, 1.0]))
        with pytest.raises(InputError, match=r"found nan at voxel \(2, 3, 1\)"):
            read_labels(path)


class TestBadFiles:
    def refuses(self, path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            read_image(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    def test_missing(self, tmp_path: Path) -> None:
        self.refuses(tmp_path / "absent.nii.gz", "no such file")

    def test_folder(self, tmp_path: Path) -> None:
        self.refuses(tmp_path, "expected a NIfTI file")

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("keep", [0.0, 0.001, 0.02, 0.5, 0.999])
    def test_truncated(self, tmp_path: Path, suffix: str, keep: float) -> None:
        rng = np.random.default_rng(0)
        path = save(tmp_path / f"scan{suffix}", rng.integers(-999, 999, (20, 20, 20)).astype(np.int16))
        whole = path.read_bytes()
        path.write_bytes(whole[: int(keep * len(whole))])
        self.refuses(path, "damaged, truncated or no NIfTI file|no NIfTI file")

    def test_truncated_within_the_checksum(self, tmp_path: Path) -> None:
        path = save(tmp_path / "scan.nii.gz", np.zeros(SHAPE, np.int16))
        path.write_bytes(path.read_bytes()[:-3])
        self.refuses(path, "truncated")

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_text_renamed(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"scan{suffix}"
        path.write_text("This is a letter, and no scan at all.\n" * 40)
        self.refuses(path, "no NIfTI file")

    def test_another_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "scan.mha").write_bytes(b"")
        self.refuses(tmp_path / "scan.mha", "expected a NIfTI file")

    def test_four_dimensions(self, tmp_path: Path) -> None:
        path = save(tmp_path / "scan.nii.gz", np.zeros((*SHAPE, 2), np.int16))
        self.refuses(path, "expected a 3-D volume, found shape 3x4x5x2")

    def test_two_dimensions(self, tmp_path: Path) -> None:
        self.refuses(save(tmp_path / "scan.nii.gz", np.zeros((3, 4), np.int16)), "expected a 3-D volume")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
    def test_not_finite(self, tmp_path: Path, value: float) -> None:
        array = np.zeros(SHAPE)
        array[2, 3, 4] = value
        self.refuses(save(tmp_path / "scan.nii.gz", array), "expected finite voxel values")

    @pytest.mark.parametrize("size", [0.0, np.nan, np.inf])
    def test_spacing(self, tmp_path: Path, size: float) -> None:
        path = save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16), pixdim=[1, size, 1, 1, 1, 1, 1, 1])
        self.refuses(path, "expected positive voxel sizes in mm, found")

    def test_singular_affine(self, tmp_path: Path) -> None:
        path = save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16), srow_x=[0, 2, 0, 0])
        self.refuses(path, "affine in its header is singular")
        patch_header(path, srow_x=[0, 0, 0, 0])
        self.refuses(path, "affine in its header is singular")

    def test_affine_not_finite(self, tmp_path: Path) -> None:
        path = save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16), srow_y=[0, np.nan, 0, 0])
        self.refuses(path, "affine in its header holds NaN")

    def test_colours(self, tmp_path: Path) -> None:
        colours = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
        self.refuses(save(tmp_path / "scan.nii", colours), "expected integer or real voxels")

    def test_voxels_said_to_lie_in_the_header(self, tmp_path: Path) -> None:
        path = save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16), vox_offset=0)
        self.refuses(path, "expected voxels from byte 352 on, its header says 0")

    def test_a_header_that_claims_terabytes(self, tmp_path: Path) -> None:
        dim = [3, 32767, 32767, 32767, 1, 1, 1, 1]
        path = save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16), dim=dim)
        self.refuses(path, "damaged, truncated")


class TestDiskFull:
    def test_no_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scan = read_image(save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16)))
        output = tmp_path / "output"
        output.mkdir()

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(nifti.nib.Nifti1Image, "to_file_map", full)
        with pytest.raises(InputError, match=r"labels\.nii\.gz: cannot be written: No space left on device"):
            write_labels(output / "labels.nii.gz", np.zeros(SHAPE, np.uint8), scan.grid)
        assert list(output.iterdir()) == []

    def test_a_file_that_may_not_grow(self, tmp_path: Path) -> None:
        """A limit on the size of files, in a process of its own, stands for the full disk."""
        shape = (64, 64, 64)
        save(tmp_path / "scan.nii", np.zeros(shape, np.int16))
        output = tmp_path / "output"
        output.mkdir()
        (output / "labels.nii").write_text("an older result")
        program = f"""
import resource, numpy as np
from effseg.data.nifti import read_image, write_labels
from effseg.errors import InputError, InputWarning
scan = read_image({str(tmp_path / "scan.nii")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
noise = np.random.default_rng(0).integers(0, 200, {shape}).astype(np.uint8)
for name in ("labels.nii", "labels.nii.gz"):
    try:
        write_labels({str(output)!r} + "/" + name, noise, scan.grid)
    except InputError as error:
        print(error)
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert result.stderr == ""
        assert [line.split(": ")[1] for line in result.stdout.splitlines()] == ["cannot be written"] * 2
        assert [file.name for file in output.iterdir()] == ["labels.nii"]
        assert (output / "labels.nii").read_text() == "an older result"

    def test_another_suffix(self, tmp_path: Path) -> None:
        scan = read_image(save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16)))
        with pytest.raises(InputError, match=r"labels\.png: expected a name"):
            write_labels(tmp_path / "labels.png", np.zeros(SHAPE, np.uint8), scan.grid)
