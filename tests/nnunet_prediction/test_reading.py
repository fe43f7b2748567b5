"""Scans that are no whole files."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from effseg.errors import InputError
from effseg.nnunet.prediction.preprocessing import read, read_labels


class Lenient:
    """A reader that takes anything, as SimpleITK takes truncated files."""

    def read_images(self, files):
        return np.zeros((len(files), 2, 3, 4), np.float32), {"spacing": [1.0, 1.0, 1.0]}

    def read_seg(self, file):
        return np.zeros((1, 2, 3, 4), np.float32), {}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a_0000.nii.gz"
    path.write_bytes(gzip.compress(np.random.default_rng(0).bytes(10_000)))
    return path


def test_a_whole_file_is_read(file):
    assert read(Lenient(), [file, file])[0].shape == (2, 2, 3, 4)
    assert read_labels(Lenient(), file).shape == (2, 3, 4)


@pytest.mark.parametrize("kept", [0.5, 0.01])
def test_a_truncated_file_is_refused(file, kept):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    for attempt in (lambda: read(Lenient(), [file]), lambda: read_labels(Lenient(), file)):
        with pytest.raises(InputError, match=r"a_0000\.nii\.gz: damaged or truncated"):
            attempt()


def gipl(file, content):
    header = np.array([4, 3, 2, 1, 15], ">u2").tobytes()
    file.write_bytes(header.ljust(256, b"\0") + content)


def nifti(file, content):
    nib.save(nib.Nifti1Image(np.zeros((4, 3, 2), np.int16), np.eye(4)), file)
    file.write_bytes(file.read_bytes()[:352] + content)


@pytest.mark.parametrize(("ending", "write"), [(".gipl", gipl), (".nii", nifti)])
def test_a_truncated_file_that_is_not_compressed_is_refused(tmp_path, ending, write):
    file = tmp_path / f"a_0000{ending}"
    write(file, bytes(2 * 4 * 3 * 2))
    assert read(Lenient(), [file])[0].shape == (1, 2, 3, 4)
    write(file, bytes(2 * 4 * 3 * 2 - 1))
    with pytest.raises(InputError, match="truncated: its header wants"):
        read(Lenient(), [file])


@pytest.mark.parametrize("ending", [".gipl", ".nii"])
def test_a_file_that_ends_in_its_header_is_refused(tmp_path, ending):
    file = tmp_path / f"a_0000{ending}"
    file.write_bytes(b"\0\4")
    with pytest.raises(InputError, match=r"truncated|no NIfTI file"):
        read(Lenient(), [file])


def test_another_file_of_that_name_is_refused(file):
    file.write_bytes(b"not compressed" * 100)
    with pytest.raises(InputError, match="damaged or truncated: Not a gzipped file"):
        read(Lenient(), [file])
