"""Folders of scans as nnU-Net names them. Needs no nnU-Net."""

import pytest

from effseg.errors import InputError
from effseg.nnunet.prediction.cases import list_scans, not_scans, unfinished


def scans(folder, *names, channels=1):
    for name in names:
        (folder / name).touch()
    return list_scans(folder, folder / "out", ".nii.gz", channels)


def test_channels_of_a_scan(tmp_path):
    found = scans(
        tmp_path, "b_0000.nii.gz", "a_1_0001.nii.gz", "a_1_0000.nii.gz", "b_0001.nii.gz", "x.txt", channels=2
    )
    assert [scan.name for scan in found] == ["a_1", "b"]
    assert [file.name for file in found[0].files] == ["a_1_0000.nii.gz", "a_1_0001.nii.gz"]
    assert found[0].target == tmp_path / "out" / "a_1"


def test_a_missing_channel(tmp_path):
    with pytest.raises(InputError, match="b: expected channels 0000, 0001, got 0001"):
        scans(tmp_path, "b_0001.nii.gz", channels=2)


@pytest.mark.parametrize("name", ["a.nii.gz", "a_0000.nii", "a_00.nii.gz"])
def test_no_scans(tmp_path, name):
    with pytest.raises(InputError, match=r"expected scans named NAME_0000\.nii\.gz, found none"):
        scans(tmp_path, name)


def test_volumes_with_other_names_are_told(tmp_path):
    """But not labels, called like the scans, nor what is no volume."""
    found = scans(
        tmp_path, "a_0000.nii.gz", "a.nii.gz", "b.nii.gz", "c_0000.nii", "d_000.nii.gz", "e_0000.NII.GZ",
        "f_0000.nrrd", "g_0000.tif", "dataset.json", ".h.nii.gz",
    )  # fmt: skip
    assert [scan.name for scan in found] == ["a"]
    assert [path.name[0] for path in not_scans(tmp_path, ".nii.gz", found)] == list("bcdefg")


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="-i: expected a folder"):
        list_scans(tmp_path / "none", tmp_path, ".nii.gz", 1)


def test_what_is_finished(tmp_path):
    found = scans(tmp_path, "a_0000.nii.gz", "b_0000.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii.gz").touch()
    assert [scan.name for scan in unfinished(found, ".nii.gz", False)] == ["b"]
    assert [scan.name for scan in unfinished(found, ".nii.gz", True)] == ["a", "b"]
