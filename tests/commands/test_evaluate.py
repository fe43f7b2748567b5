import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from effseg.cli import main
from effseg.phantom import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), cases=3, shape=(32, 24, 24), unseen=0)


@pytest.fixture
def found(dataset, tmp_path):
    """Segmentations: the labels, moved by a voxel in the last case."""
    folder = shutil.copytree(dataset / "labelsTr", tmp_path / "found")
    for path in folder.iterdir():
        volume = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(volume.dataobj), volume.affine), path)
    path = folder / "phantom_002.nii.gz"
    labels = nib.load(path)
    nib.save(nib.Nifti1Image(np.roll(np.asarray(labels.dataobj), 1, 2), labels.affine), path)
    return folder


def evaluate(found, labels, output, *more):
    paths = {"--predictions": found, "--labels": labels, "--output": output}
    return main(["evaluate", *(str(word) for pair in paths.items() for word in pair), *more])


def test_table_and_json(dataset, found, tmp_path, capsys):
    assert evaluate(found, dataset, tmp_path / "summary.json", "--tolerance", "2.5") == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "NSD 2.5 mm" in printed
    first = "phantom_000.nii.gz"
    assert f"{found / first} against {dataset / 'labelsTr' / first}" in printed
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.count("│") > 3}
    for value, name in summary["names"].items():
        assert f"{summary['mean'][value]['Dice']:.3f}" in rows[name]
    assert f"{summary['foreground_mean']['HD95']:.2f}" in rows["mean"]
    assert 0.5 < summary["mean"]["1"]["Dice"] < 1


def test_perfect_cases_only(dataset, found, tmp_path):
    """labelsTr itself is given: the names come from the folder above."""
    output = tmp_path / "summary.json"
    assert evaluate(found, dataset / "labelsTr", output, "--cases", "phantom_000-phantom_001") == 0
    summary = json.loads(output.read_text())
    assert len(summary["metric_per_case"]) == 2
    assert summary["foreground_mean"]["Dice"] == summary["foreground_mean"]["NSD"] == 1
    assert summary["foreground_mean"]["HD95"] == 0


def test_selected_organs(dataset, found, tmp_path):
    output = tmp_path / "summary.json"
    assert evaluate(found, dataset, output, "--label-selection", "liver,aorta") == 0
    assert list(json.loads(output.read_text())["names"].values()) == ["liver", "aorta"]


def refuse(capsys, *arguments):
    assert evaluate(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("effseg: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_missing_prediction(dataset, found, tmp_path, capsys):
    (found / "phantom_001.nii.gz").unlink()
    assert "no prediction for phantom_001" in refuse(capsys, found, dataset, tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists()


def test_no_names_of_organs(dataset, found, tmp_path, capsys):
    labels = shutil.copytree(dataset / "labelsTr", tmp_path / "alone/deep")
    assert "dataset.json or labels.json" in refuse(capsys, found, labels, tmp_path / "s.json")
    assert evaluate(found, labels, tmp_path / "s.json", "--dataset", str(dataset)) == 0


def test_truncated_prediction(dataset, found, tmp_path, capsys):
    path = found / "phantom_000.nii.gz"
    path.write_bytes(path.read_bytes()[:-50])
    assert "phantom_000.nii.gz: damaged, truncated" in refuse(capsys, found, dataset, tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists()


def test_folders_where_files_belong(dataset, found, tmp_path, capsys):
    assert "expected the name of a JSON file" in refuse(capsys, found, dataset, tmp_path)
    file = dataset / "dataset.json"
    assert "dataset.json: expected a folder" in refuse(capsys, found, file, tmp_path / "s.json")
    assert "dataset.json: expected a folder" in refuse(capsys, file, dataset, tmp_path / "s.json")


def test_interrupted_write_keeps_the_older_file(dataset, found, tmp_path, monkeypatch):
    output = tmp_path / "summary.json"
    output.write_text("older")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    assert evaluate(found, dataset, output, "--cases", "phantom_000") == 2
    monkeypatch.undo()
    assert output.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found", "summary.json"]
