"""Scans that are no whole files."""

import gzip

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


def test_another_file_of_that_name_is_refused(file):
    file.write_bytes(b"not compressed" * 100)
    with pytest.raises(InputError, match="damaged or truncated: Not a gzipped file"):
        read(Lenient(), [file])
