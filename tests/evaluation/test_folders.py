import gzip
import io
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from effseg.data.labels import LabelMap
from effseg.errors import InputError
from effseg.evaluation.folders import (
    describe_pairs,
    evaluate_folders,
    pair_files,
    summary_table,
    write_summary,
)

MAP = LabelMap(("background", "liver", "spleen", "gallbladder"), (0, 1, 5, 12))
SHAPE = (12, 10, 8)


def save(path, labels, spacing=(1.0, 2.0, 3.0), flip=False):
    """Write labels given in RAS+; `flip` stores them with the first axis running to the left."""
    affine = np.diag([*spacing, 1.0])
    if flip:
        affine[0] = -affine[0]
        affine[0, 3] = (labels.shape[0] - 1) * spacing[0]
        labels = labels[::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(labels), affine), path)


@pytest.fixture
def folders(tmp_path):
    """Two cases: "a" with a liver found but for one plane, "b" with a spleen missed."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:6, 2:8, 2:6] = 1
    found = labels.copy()
    found[2] = 0
    save(tmp_path / "labels/a.nii.gz", labels)
    save(tmp_path / "found/a.nii.gz", found)
    labels = labels.copy()
    labels[8:10, 2:4, 2:4] = 5
    save(tmp_path / "labels/b.nii.gz", labels)
    labels = labels.copy()
    labels[labels == 5] = 0
    save(tmp_path / "found/b.nii.gz", labels)
    return tmp_path / "found", tmp_path / "labels"


def test_summary_as_nnunet_writes_it(folders, tmp_path):
    summary = evaluate_folders(*folders, MAP, tolerance_mm=1.0)
    assert set(summary["mean"]) == {"1", "5", "12"}
    assert summary["names"] == {"1": "liver", "5": "spleen", "12": "gallbladder"}
    first, second = summary["metric_per_case"]
    assert first["prediction_file"] == str(folders[0] / "a.nii.gz")
    assert first["reference_file"] == str(folders[1] / "a.nii.gz")
    counts = ("Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref")
    assert set(first["metrics"]["1"]) == {*counts, "NSD", "HD95"}
    assert [first["metrics"]["1"][name] for name in counts] == [
        pytest.approx(144 / 168),
        pytest.approx(72 / 96),
        72,
        0,
        24,
        np.prod(SHAPE) - 96,
        72,
        96,
    ]
    assert first["metrics"]["1"]["HD95"] == 1
    assert second["metrics"]["5"]["Dice"] == second["metrics"]["5"]["NSD"] == 0
    assert second["metrics"]["5"]["HD95"] == pytest.approx(np.linalg.norm([12, 20, 24]))

    liver = summary["mean"]["1"]["Dice"]
    assert liver == pytest.approx((144 / 168 + 1) / 2)
    assert summary["mean"]["5"]["Dice"] == 0  # absent in both files of case a: one case counts
    assert np.isnan(summary["mean"]["12"]["Dice"])
    assert summary["foreground_mean"]["Dice"] == pytest.approx(liver / 2)

    write_summary(summary, tmp_path / "deep" / "summary.json")
    text = (tmp_path / "deep/summary.json").read_text()
    assert '"Dice": NaN' in text
    assert json.loads(text)["metric_per_case"][1]["metrics"]["1"]["Dice"] == 1
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep/summary.json"]


def test_other_axis_order_on_the_same_grid(folders):
    labels = np.asarray(nib.load(folders[1] / "a.nii.gz").dataobj)
    save(folders[0] / "a.nii.gz", labels, flip=True)
    assert evaluate_folders(*folders, MAP, cases="a")["foreground_mean"]["Dice"] == 1


def test_ignored_voxels_and_organs_left_out(folders):
    labels = np.asarray(nib.load(folders[1] / "a.nii.gz").dataobj).copy()
    labels[2][labels[2] == 1] = 7
    labels[9, 9, 7] = 12
    save(folders[1] / "a.nii.gz", labels)
    found = np.asarray(nib.load(folders[0] / "a.nii.gz").dataobj).copy()
    found[11, 0, 0] = 7
    save(folders[0] / "a.nii.gz", found)
    selected = LabelMap(("background", "liver"), (0, 1), ignore=7, left_out=(5, 12))
    metrics = evaluate_folders(*folders, selected, cases="a")["metric_per_case"][0]["metrics"]
    assert set(metrics) == {"1"}
    assert metrics["1"]["Dice"] == 1
    assert metrics["1"]["TN"] == np.prod(SHAPE) - 72 - 24


def test_table(folders):
    """Names are printed as they are, whatever brackets they hold; what is not known is a dash."""
    names = ("background", "lung [left]", "spleen", "gallbladder")
    table = summary_table(evaluate_folders(*folders, LabelMap(names, MAP.values)))
    screen = io.StringIO()
    Console(file=screen, width=100).print(table)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in screen.getvalue().splitlines()]
    rows = [row for row in rows if row]
    assert rows[0][:2] == ["lung [left]", f"{(144 / 168 + 1) / 2:.3f}"]
    assert rows[0][4] == "2"
    assert rows[1] == ["spleen", "0.000", "0.000", "33.47", "1"]
    assert rows[2] == ["gallbladder", "-", "-", "-", "0"]
    assert rows[3][0] == "mean"


def test_told_of_each_case(folders):
    told = []
    evaluate_folders(*folders, MAP, on_case=lambda name, total: told.append((name, total)))
    assert told == [("a", 2), ("b", 2)]


class TestPairs:
    def touch(self, folder, *names):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).touch()
        return folder

    def names(self, *folders, cases=None):
        return [(case.name, case.images[0].name, case.labels.name) for case in pair_files(*folders, cases)]

    def test_flat_pairs_leave_the_scans_alone(self, tmp_path):
        found = self.touch(tmp_path / "found", "p1.nii.gz", "p2.nii.gz", "notes.txt", ".hidden.nii.gz")
        labels = self.touch(
            tmp_path / "data", "p1_ct.nii.gz", "p1_seg.nii.gz", "p2_ct.nii.gz", "p2_seg.nii.gz", "labels.json"
        )
        assert self.names(found, labels) == [
            ("p1", "p1.nii.gz", "p1_seg.nii.gz"),
            ("p2", "p2.nii.gz", "p2_seg.nii.gz"),
        ]

    def test_one_name_that_ends_in_seg_hides_no_other(self, tmp_path):
        names = (
            "liver_seg.nii.gz",
            "liver.nii.gz",
            "liver_0001.nii.gz",
            "x.nii.gz",
            "x_ct.nii.gz",
            "y_0000.nii.gz",
        )
        labels = self.touch(tmp_path / "labels", *names)
        found = self.touch(tmp_path / "found", "liver_seg.nii.gz", "x.nii.gz")
        assert [name for name, *_ in self.names(found, labels)] == ["liver", "x"]

    def test_nnunet_folder(self, tmp_path):
        found = self.touch(tmp_path / "found", "p1.nii.gz")
        self.touch(tmp_path / "data/labelsTr", "p1.nii.gz", "p2.nii.gz")
        assert self.names(found, tmp_path / "data", cases="p1") == [("p1", "p1.nii.gz", "p1.nii.gz")]

    def test_a_selection_leaves_other_files_alone(self, tmp_path):
        found = self.touch(tmp_path / "found", "p1.nii", "q.nii.gz")
        labels = self.touch(tmp_path / "labels", "p1.nii.gz", "p3.nii.gz")
        assert self.names(found, labels, cases="p1") == [("p1", "p1.nii", "p1.nii.gz")]

    @pytest.mark.parametrize(
        ("found", "labels", "cases", "message"),
        [
            (["a.nii.gz"], ["a.nii.gz", "b.nii.gz"], None, "found: no prediction for b of "),
            (["a.nii.gz", "b.nii.gz"], ["a.nii.gz"], None, "labels: no labels for the prediction b in "),
            (["a.nii.gz"], ["a.nii.gz"], "z*", "no case 'z\\*'"),
            (["readme.txt"], ["a.nii.gz"], None, "found: expected label files"),
            (["a.nii.gz"], [], None, "labels: expected label files"),
            (["a.nii.gz", "a.nii"], ["a.nii.gz"], None, "found: more than one file would be case 'a'"),
        ],
    )
    def test_refused(self, tmp_path, found, labels, cases, message):
        folders = self.touch(tmp_path / "found", *found), self.touch(tmp_path / "labels", *labels)
        with pytest.raises(InputError, match=message):
            pair_files(*folders, cases)

    def test_no_folder(self, tmp_path):
        with pytest.raises(InputError, match="nowhere: no such folder"):
            pair_files(tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_bad_tolerance(folders, tolerance):
    with pytest.raises(InputError, match="tolerance: expected mm"):
        evaluate_folders(*folders, MAP, tolerance_mm=tolerance)


def test_other_grid(folders):
    labels = np.asarray(nib.load(folders[1] / "a.nii.gz").dataobj)
    save(folders[0] / "a.nii.gz", labels[1:])
    with pytest.raises(InputError, match=r"found/a.nii.gz: labels are not on the grid of .*labels/a.nii.gz"):
        evaluate_folders(*folders, MAP)
    save(folders[0] / "a.nii.gz", labels, spacing=(1.0, 2.0, 2.0))
    with pytest.raises(InputError, match="mm apart"):
        evaluate_folders(*folders, MAP)


def test_unknown_value(folders):
    labels = np.asarray(nib.load(folders[0] / "a.nii.gz").dataobj).copy()
    labels[0, 0, 0] = 99
    save(folders[0] / "a.nii.gz", labels)
    with pytest.raises(InputError, match=r"found/a.nii.gz: label value 99 is not in the label map"):
        evaluate_folders(*folders, MAP)


WAYS = ("folder", "linked folder", "link", "hard link", "copy", "unpacked", "packed anew")


class TestItself:
    """A label file is never scored against itself."""

    def labels(self, folder, name="a"):
        labels = np.zeros(SHAPE, np.uint8)
        labels[2:6, 2:8, 2:6] = 1
        save(folder / f"{name}.nii.gz", labels)
        return folder / f"{name}.nii.gz"

    @pytest.mark.parametrize(
        "way", ["folder", "linked folder", "link", "hard link", "copy", "unpacked", "packed anew"]
    )
    def test_refused(self, tmp_path, way):
        path = self.labels(tmp_path / "labels")
        found = tmp_path / "found"
        if way == "folder":
            found = path.parent
        elif way == "linked folder":
            found.symlink_to(path.parent)
        else:
            found.mkdir()
        if way == "link":
            (found / path.name).symlink_to(path)
        elif way == "hard link":
            (found / path.name).hardlink_to(path)
        elif way == "copy":
            shutil.copy(path, found / path.name)
        elif way == "unpacked":
            (found / "a.nii").write_bytes(gzip.decompress(path.read_bytes()))
        elif way == "packed anew":
            (found / path.name).write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1))
        with pytest.raises(InputError, match=r"scored against itself|predictions beside the label files"):
            evaluate_folders(found, path.parent, MAP)

    def test_a_perfect_prediction_counts(self, tmp_path):
        path = self.labels(tmp_path / "labels")
        volume = nib.load(path)
        volume.header["descrip"] = b"a network"
        (tmp_path / "found").mkdir()
        nib.save(volume, tmp_path / "found" / "a.nii.gz")
        assert evaluate_folders(tmp_path / "found", path.parent, MAP)["foreground_mean"]["Dice"] == 1

    def test_two_files_without_any_organ_count(self, tmp_path):
        for folder in ("labels", "found"):
            save(tmp_path / folder / "a.nii.gz", np.zeros(SHAPE, np.uint8))
        summary = evaluate_folders(tmp_path / "found", tmp_path / "labels", MAP)
        assert np.isnan(summary["foreground_mean"]["Dice"])

    def test_predictions_beside_scans_and_labels(self, tmp_path):
        """As `effseg predict` writes them into a folder of pairs."""
        path = self.labels(tmp_path)
        truth = np.asarray(nib.load(path).dataobj).copy()
        truth[2] = 0
        save(tmp_path / "a_seg.nii.gz", truth)
        save(tmp_path / "a_ct.nii.gz", truth)
        summary = evaluate_folders(tmp_path, tmp_path, MAP)
        assert describe_pairs(summary) == [f"{path} against {tmp_path / 'a_seg.nii.gz'}"]
        assert summary["mean"]["1"]["Dice"] == pytest.approx(144 / 168)


def test_pairs_are_named(folders):
    summary = evaluate_folders(*folders, MAP)
    assert describe_pairs(summary, most=1) == [
        f"{folders[0] / 'a.nii.gz'} against {folders[1] / 'a.nii.gz'}",
        "... 2 pairs",
    ]


def test_one_spelling_of_an_umlaut(folders):
    for folder, name in zip(folders, ("fa\u0308lle.nii.gz", "fälle.NII.GZ"), strict=True):
        (folder / "a.nii.gz").rename(folder / name)
    assert [pair.name for pair in pair_files(*folders)] == ["b", "fälle"]
