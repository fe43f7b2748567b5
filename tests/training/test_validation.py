"""Validation while training scores whole scans, as `effseg evaluate` scores what `predict` writes."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from effseg.cli import main
from effseg.data.labels import load_label_map
from effseg.errors import InputError
from effseg.evaluation.folders import evaluate_folders
from effseg.training import TrainingConfig, loop, train
from effseg.training.data import load_training_data
from effseg.training.distributed import World

SHAPE = (28, 24, 20)


def write(folder, channels=("CT",), satellite=True):
    """Bodies with two organs; a labelled plate beside the body is no anatomy by its shape."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for number in range(5):
        rng = np.random.default_rng(number)
        labels = np.zeros(SHAPE, np.uint8)
        ct = np.full(SHAPE, -1000.0)
        ct[9:25, 4:20, 2:18] = 20
        labels[12:17, 7:14, 4:12], labels[18:22, 10:15, 8:15] = 1, 2
        if satellite:
            ct[3, 5:18, 3:17] = 300
            labels[3, 6:9, 5:8] = 2
        ct[labels == 1], ct[labels == 2] = 200, -120
        affine = np.diag([2.0, 2.0, 3.0, 1.0])
        for channel, _ in enumerate(channels):
            image = (ct + rng.normal(0, 10, SHAPE)) if channel == 0 else rng.gamma(2, 50, SHAPE)
            path = folder / "imagesTr" / f"c{number}_{channel:04d}.nii.gz"
            nib.save(nib.Nifti1Image(image.astype(np.float32), affine), path)
        nib.save(nib.Nifti1Image(labels, affine), folder / "labelsTr" / f"c{number}.nii.gz")
    entries = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop._Run, "_draw_curves", lambda *arguments: None)


def config(data, tmp_path, **options):
    options = {"model": "effseg-tiny", "steps": 3, "validation_interval": 3, "workers": 0} | options
    return TrainingConfig(data=data, output=tmp_path / "run", **options)


@pytest.mark.parametrize("spacing", [None, (3.0, 2.5, 3.0)], ids=str)
def test_validation_is_the_evaluation_of_the_predicted_files(tmp_path, spacing):
    data = write(tmp_path / "data")
    result = train(config(data, tmp_path, spacing=spacing, validation="c1,c3", learning_rate=0.03))
    (tmp_path / "scans").mkdir()
    for name in ("c1", "c3"):
        (tmp_path / "scans" / f"{name}_0000.nii.gz").symlink_to(data / "imagesTr" / f"{name}_0000.nii.gz")
    words = ["--checkpoint", result.final, "--input", tmp_path / "scans", "--output", tmp_path / "out"]
    assert main(["predict", "--device", "cpu", *map(str, words)]) == 0
    summary = evaluate_folders(tmp_path / "out", data, load_label_map(data), cases="c1,c3")
    expected = [summary["mean"][value]["Dice"] for value in ("1", "2")]
    assert list(result.final_dice.values()) == pytest.approx(expected, abs=1e-6)
    assert np.mean(expected) == pytest.approx(summary["foreground_mean"]["Dice"])


def test_the_best_network_is_not_chosen_by_an_organ_that_no_case_shows(tmp_path, monkeypatch):
    """Its Dice is unknown until a single voxel is taken for it, and 0 from then on."""
    data = write(tmp_path / "data", satellite=False)
    path = data / "labelsTr" / "c1.nii.gz"
    image = nib.load(path)
    labels = np.asarray(image.dataobj) % 2  # without organ b
    nib.save(nib.Nifti1Image(labels, image.affine), path)
    scores = iter([[0.7, np.nan], [0.85, 0.0], [0.8, np.nan]])
    monkeypatch.setattr(loop, "validate", lambda *given: next(scores))
    result = train(config(data, tmp_path, validation="c1", validation_interval=1))
    assert result.best_step == 2
    assert result.best_dice == {"a": 0.85, "b": 0.0}


def test_of_no_organ_any_network_is_the_best_so_far(tmp_path, monkeypatch):
    data = write(tmp_path / "data", satellite=False)
    path = data / "labelsTr" / "c1.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), image.affine), path)
    scores = iter([[0.0, 0.0], [0.0, np.nan], [np.nan, np.nan]])
    monkeypatch.setattr(loop, "validate", lambda *given: next(scores))
    assert train(config(data, tmp_path, validation="c1", validation_interval=1)).best_step == 1


def test_labelled_voxels_outside_of_the_body_train_and_count_as_missed(tmp_path):
    said = []
    settings = config(write(tmp_path / "data"), tmp_path, validation="c1", augment=False)
    data = load_training_data(settings, World(0, 1, torch.device("cpu")), said.append)
    lost = 9
    for case in data.training:
        assert (np.asarray(case.labels) == 2).sum() == 4 * 5 * 7 + lost
    (whole,) = data.validation
    assert whole.labels.shape == SHAPE
    assert whole.prepared.box[0].start > 3
    assert sum("c1.nii.gz: 9 labelled voxels lie outside of the crop" in line for line in said) == 1
    assert sum("the crop is made larger to hold 9 labelled voxels" in line for line in said) == 4
    again = []
    load_training_data(settings, World(0, 1, torch.device("cpu")), again.append)
    assert again == said  # from the cache, too


def test_channels_that_are_no_ct_are_standardised_in_training_and_prediction(tmp_path):
    said = []
    settings = config(write(tmp_path / "data", ("CT", "PET"), satellite=False), tmp_path, augment=False)
    data = load_training_data(settings, World(0, 1, torch.device("cpu")), said.append)
    assert data.preprocessing.window == ((-200.0, 400.0), None)
    assert "channels CT, PET: -200 to 400 HU, standardised" in said
    for case in data.training:
        channel = data.preprocessing.normalise(np.asarray(case.image))[1]
        assert channel.mean().item() == pytest.approx(0, abs=1e-3)
        assert channel.std().item() == pytest.approx(1, abs=1e-2)
    chosen = settings.replace(window=((-200, 400), (0, 250)))
    windows = load_training_data(chosen, World(0, 1, torch.device("cpu")), said.append).preprocessing.window
    assert windows == ((-200.0, 400.0), (0.0, 250.0))


def test_a_window_for_no_channel_is_refused(tmp_path):
    settings = config(write(tmp_path / "data", ("PET",), satellite=False), tmp_path, window=(0, 250))
    with pytest.raises(InputError, match=r"window: expected none, as no channel is CT \(PET\), got "):
        load_training_data(settings, World(0, 1, torch.device("cpu")), print)
    chosen = settings.replace(window=((0, 250),))
    data = load_training_data(chosen, World(0, 1, torch.device("cpu")), print)
    assert data.preprocessing.window == ((0.0, 250.0),)


def test_scans_that_are_not_in_hu_are_told_in_training_and_prediction(tmp_path, capsys):
    data = write(tmp_path / "data", satellite=False)
    for path in (data / "imagesTr").iterdir():
        image = nib.load(path)
        array = np.rint(image.get_fdata() + 1024).clip(0).astype(np.int16)
        nib.save(nib.Nifti1Image(array, image.affine), path)
    words = ["--data", data, "--output", tmp_path / "run", "--steps", "1", "--model", "effseg-tiny"]
    assert main(["train", "--device", "cpu", *map(str, words)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("cannot be CT in HU: the values lie from 0") == 5
    scan = data / "imagesTr" / "c1_0000.nii.gz"
    words = ["--checkpoint", tmp_path / "run", "--input", scan, "--output", tmp_path / "c1.nii.gz"]
    assert main(["predict", "--device", "cpu", *map(str, words)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"effseg: warning: {scan}: cannot be CT in HU")
