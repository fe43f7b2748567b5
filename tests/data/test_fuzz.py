"""NIfTI files with bytes changed at random: nibabel's reading, or one line; no traceback, no leftover."""

import gzip
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from effseg.cli import main
from effseg.data.labels import LabelMap
from effseg.data.nifti import read_image, read_labels
from effseg.data.preprocessing import Preprocessing
from effseg.errors import InputError
from effseg.models.effsegnet import EffSegNet

SHAPE = (6, 5, 4)
TYPES = [np.int16, np.uint8, np.uint16, np.float32, np.float64, np.int64, np.uint64, ">i2", ">f4"]
NUMBERS = [0, 1, -1, 0.5, np.nan, np.inf, -np.inf, 1e-40, 1e30, 3e-5, 32767, -32768, 2.0]
FIELDS = ["pixdim", "qoffset_x", "quatern_b", "quatern_c", "quatern_d", "srow_x", "srow_y", "srow_z"]
FIELDS += ["scl_slope", "scl_inter", "vox_offset", "dim", "datatype", "bitpix", "qform_code", "sform_code"]
FIELDS += ["intent_code", "xyzt_units", "magic", "sizeof_hdr", "cal_max", "slice_code", "dim_info", "descrip"]


def mutant(seed: int, folder: Path) -> Path:
    """A small file with one to three things wrong, or harmless: fields, bytes, length, compression."""
    rng = np.random.default_rng(seed)
    stored = np.dtype(TYPES[rng.integers(len(TYPES))])
    array = np.full(SHAPE, -1000 if stored.kind in "if" and stored.itemsize > 1 else 0, stored)
    array[1:5, 1:4, 1:3] = rng.integers(0, 100, (4, 3, 2))
    affine = np.diag([*rng.uniform(0.5, 4, 3), 1.0]) @ np.diag([*rng.choice([-1, 1], 3), 1])
    kind = nib.Nifti2Image if rng.random() < 0.2 else nib.Nifti1Image
    header = kind.header_class(endianness=">" if stored.byteorder == ">" else "<")
    image = kind(array, affine, header, dtype=stored)
    codes = [(1, 1), (1, 0), (0, 2), (0, 0)][rng.integers(4)]
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    data = bytearray(image.to_bytes())
    for _ in range(rng.integers(1, 4)):
        choice = rng.integers(5)
        if choice < 3:
            block = kind.header_class.template_dtype.newbyteorder(header.endianness)
            name = FIELDS[rng.integers(len(FIELDS))]
            where = block.fields[name]
            size = where[0].base.itemsize
            at = where[1] + size * int(rng.integers(max(1, where[0].itemsize // size)))
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                number = np.array(NUMBERS[rng.integers(len(NUMBERS))])
                if where[0].base.kind in "iuf":
                    data[at : at + size] = number.astype(where[0].base).tobytes()
        elif choice == 3:
            for at in rng.integers(0, len(data), 4):
                data[at] = rng.integers(256)
        else:
            data = data[: rng.integers(1, len(data) + 1)]
    path = folder / f"m{seed}.nii"
    if rng.random() < 0.5:
        packed = bytearray(gzip.compress(bytes(data), 1))
        if rng.random() < 0.3:
            packed[rng.integers(len(packed))] ^= 1 << rng.integers(8)
        if rng.random() < 0.2:
            packed = packed[: rng.integers(1, len(packed))]
        data, path = packed, path.with_suffix(".nii.gz")
    path.write_bytes(data)
    return path


def nibabels(path: Path) -> nib.Nifti1Image | None:
    """The same file as nibabel reads it, axes in RAS+ and in mm; None where it does not."""
    nib.imageglobals.logger.disabled = True
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            image = nib.load(path)
            array = np.asarray(image.dataobj, np.float64)
            array = array.reshape(array.shape[:3])
            mm = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)
            return nib.as_closest_canonical(nib.Nifti1Image(array, np.diag([mm, mm, mm, 1]) @ image.affine))
    except Exception:  # nibabel's errors are of many kinds
        return None


def agrees_or_is_refused(path: Path) -> bool:
    """Read a file as a scan and as labels; whether the scan was read."""
    expected, scan, errors = nibabels(path), None, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read_labels(path)
        except InputError as error:
            errors.append(str(error))
        try:
            scan = read_image(path)
        except InputError as error:
            errors.append(str(error))
    assert all("\n" not in error and str(path) in error for error in errors)
    if scan is None:
        return False
    if expected is not None:
        np.testing.assert_allclose(scan.array[0], np.asarray(expected.dataobj), rtol=1e-6, atol=1e-30)
        np.testing.assert_allclose(scan.grid.ras_affine, expected.affine, rtol=1e-5, atol=1e-6)
    return True


def test_files_with_faults_are_read_as_nibabel_does_or_refused(tmp_path: Path) -> None:
    read = 0
    for seed in range(200):
        path = mutant(seed, tmp_path)
        start = time.monotonic()
        read += agrees_or_is_refused(path)
        assert time.monotonic() - start < 10
        path.unlink()
    assert 20 < read < 180  # faults that matter, and some that do not
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_2000_files_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label_map = LabelMap(("background", "a"), (0, 1))
    network = tmp_path / "network.safetensors"
    EffSegNet(1, 2, preset="tiny").save(
        network,
        extra={
            "preprocessing": Preprocessing(spacing=(2.0, 2.0, 2.0)).to_dict(),
            "labels": label_map.to_dict(),
            "training": {"patch_size": None},
        },
    )
    (tmp_path / "in").mkdir()
    for seed in range(2000):
        path, output = mutant(seed, tmp_path / "in"), tmp_path / "out" / "labels.nii.gz"
        start = time.monotonic()
        read = agrees_or_is_refused(path)
        code = main(["predict", "--device", "cpu", "--checkpoint", str(network), "--input", str(path),
                     "--output", str(output)])  # fmt: skip
        assert time.monotonic() - start < 10
        told = capsys.readouterr().err.splitlines()
        errors = [line for line in told if not line.startswith("effseg: warning: ")]
        assert (code, len(errors)) in ((0, 0), (2, 1)), told
        assert code == 2 or read
        left = list(output.parent.iterdir()) if output.parent.exists() else []
        assert left == ([output] if code == 0 else [])
        if code == 0:
            assert nib.load(output).get_data_dtype() == np.uint8
            output.unlink()
        path.unlink()
