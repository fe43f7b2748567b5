"""`effseg nnunet` before nnU-Net is called."""

import os
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from effseg import cli
from effseg.commands import nnunet
from effseg.nnunet import TRAINERS, VARIABLE
from effseg.nnunet.prediction import trainers


@pytest.fixture
def called(monkeypatch, tmp_path):
    """What nnU-Net's entry points would see."""
    seen = {}

    def call(module, name, arguments):
        seen.update(module=module, name=name, arguments=list(arguments), trainers=os.environ[VARIABLE])

    monkeypatch.setitem(sys.modules, nnunet.__name__, nnunet)  # other tests import commands anew
    monkeypatch.setattr(nnunet, "_call", call)
    monkeypatch.setattr(metadata, "version", lambda name: "2.8.1")
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in nnunet.FOLDERS:
        monkeypatch.setenv(name, str(tmp_path))
    yield seen
    os.environ.pop(VARIABLE, None)


def test_train_has_a_trainer(called):
    assert cli.main(["nnunet", "train", "1", "3d_fullres", "0", "--c"]) == 0
    assert called["name"] == "run_training_entry"
    assert called["arguments"] == ["1", "3d_fullres", "0", "--c", "-tr", "nnUNetTrainerEffSeg"]
    assert called["trainers"] == TRAINERS


def test_train_with_another_trainer(called):
    assert cli.main(["nnunet", "train", "1", "3d_fullres", "all", "-tr", "nnUNetTrainerEffSegFull"]) == 0
    assert called["arguments"] == ["1", "3d_fullres", "all", "-tr", "nnUNetTrainerEffSegFull"]
    assert cli.main(["nnunet", "train", "1", "3d_fullres", "all", "-tr=nnUNetTrainerEffSegFull"]) == 0
    assert called["arguments"] == ["1", "3d_fullres", "all", "-tr=nnUNetTrainerEffSegFull"]


def test_planning_needs_no_trainer(called):
    assert cli.main(["nnunet", "plan_and_preprocess", "-d", "1", "-c", "3d_fullres"]) == 0
    assert called["arguments"] == ["-d", "1", "-c", "3d_fullres"]


def test_folders_are_asked_for(called, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results")
    assert cli.main(["nnunet", "train", "1", "3d_fullres", "0"]) == 2
    assert capsys.readouterr().err.startswith("effseg: error: nnUNet_results: nnU-Net expects a folder")
    assert cli.main(["nnunet", "train", "--help"]) == 0


def test_old_nnunet_is_told(called, monkeypatch, capsys):
    monkeypatch.setattr(metadata, "version", lambda name: "2.7.3")
    assert cli.main(["nnunet", "train", "1", "3d_fullres", "0"]) == 2
    assert "expected version 2.8 or newer, got 2.7.3" in capsys.readouterr().err


def test_missing_nnunet_is_told(monkeypatch, capsys):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert cli.main(["nnunet", "predict", "-i", "scans"]) == 2
    assert capsys.readouterr().err == "effseg: error: nnU-Net is not installed: pip install nnunetv2\n"


def test_entry_points_read_their_own_arguments(monkeypatch):
    before = sys.argv
    monkeypatch.setitem(sys.modules, "entry_module", type(sys)("entry_module"))
    sys.modules["entry_module"].entry = lambda: seen.extend(sys.argv)
    seen = []
    nnunet._call("entry_module", "entry", ["-d", "1"])
    assert seen == ["entry", "-d", "1"]
    assert sys.argv is before


@pytest.fixture
def predicted(called, monkeypatch):
    """What this package's predictor would be given."""
    seen = []
    monkeypatch.setattr(nnunet.nnunet_predict, "predict", seen.append)
    monkeypatch.setattr(trainers, "knows", lambda name: name.startswith("nnUNetTrainer"))
    return seen


@pytest.mark.parametrize("folder", [["-m", "model"], ["-m=model"]])
def test_a_models_folder_needs_no_variables(called, predicted, monkeypatch, folder):
    for name in nnunet.FOLDERS:
        monkeypatch.delenv(name)
    assert cli.main(["nnunet", "predict", "-i", "scans", "-o", "out", *folder]) == 0
    assert predicted[0][:4] == ["-i", "scans", "-o", "out"]
    assert not called
    assert cli.main(["nnunet", "train", "1", "3d_fullres", "0", *folder]) == 2


def test_known_trainers_models_by_name(called, predicted):
    assert cli.main(["nnunet", "predict", "-d", "1", "-c", "2d", "-i", "a", "-o", "b"]) == 0
    assert predicted == [["-d", "1", "-c", "2d", "-i", "a", "-o", "b", "-tr", "nnUNetTrainerEffSeg"]]
    assert not called


@pytest.mark.parametrize("others", [["-tr", "Mine"]])
def test_what_is_left_to_nnunet(called, predicted, monkeypatch, others):
    monkeypatch.setitem(sys.modules, nnunet.PREDICTION, SimpleNamespace(nnUNetPredictor=None))
    monkeypatch.setitem(sys.modules, "effseg.nnunet.predictor", SimpleNamespace(Predictor=None))
    assert cli.main(["nnunet", "predict", "-d", "1", "-c", "2d", "-i", "a", "-o", "b", *others]) == 0
    assert called["name"] == "predict_entry_point"
    assert not predicted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "-m: expected a model's folder, or -d and -c"),
        (["-m", "a", "-d", "1"], "-d: expected none with -m"),
        (["-m", "a", "-f", "first"], "-f: expected numbers or all, got 'first'"),
        (["-m", "a", "--unknown"], "unrecognized arguments: --unknown"),
        (["-m", "a", "-step_size", "x"], "-step_size: invalid float value: 'x'"),
    ],
)
def test_arguments_that_predict_refuses(called, capsys, arguments, message):
    assert cli.main(["nnunet", "predict", "-i", "scans", "-o", "out", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_help_of_predict(called, capsys):
    assert cli.main(["nnunet", "predict", "--help"]) == 0
    assert "-m FOLDER" in capsys.readouterr().out
