"""Runs of `effseg train` and `effseg predict` whose processes share volumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from safetensors.torch import load_file

from effseg import phantom
from effseg.errors import InputError
from effseg.training import loop, train
from effseg.training.config import TrainingConfig
from effseg.training.distributed import join_world
from effseg.training.records import read_rows

PROGRAM = Path(__file__).parents[1] / "training" / "double_run.py"
TOLERANCE = 1e-4  # images and class weights are float32, and AdamW divides small gradients by small numbers
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def configured(folder, name, **values):
    return TrainingConfig(
        data=folder / "data", output=folder / name, model="effseg-tiny", crop="none",
        validation="phantom_000", validation_interval=2, checkpoint_interval=2, seed=1, **values,
    )  # fmt: skip


def run(size, *arguments, ends_well=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, str(size), *map(str, arguments)], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert (done.returncode == 0) == ends_well, done.stderr


def in_doubles(config, dies_at=None):
    path = config.output.with_suffix(".json")
    path.write_text(json.dumps(config.to_dict()))
    end = [] if dies_at is None else [dies_at]
    run(config.split_volume, PROGRAM, path, *end, ends_well=dies_at is None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    # The deepest level has several voxels: a single one is its own mean, on the activation's kink.
    phantom.write_dataset(folder / "data", cases=4, shape=(65, 40, 36), seed=0)
    return folder


@pytest.mark.slow
def test_a_shared_run_is_that_of_one_process_and_goes_on_in_another_number(folder, monkeypatch):
    build = loop._network
    monkeypatch.setattr(loop, "_network", lambda *arguments: build(*arguments).double())
    train(configured(folder, "one", steps=4))
    two = configured(folder, "two", steps=4, split_volume=2)
    in_doubles(two, dies_at=3)  # its checkpoint is of step 2
    in_doubles(two.replace(split_volume=3))
    for name in ("loss", "gradient_norm", "dice_mean"):
        expected, got = (
            [float(row[name]) for row in read_rows(folder / run / "progress.csv") if row[name]]
            for run in ("one", "two")
        )
        assert got == pytest.approx(expected, rel=TOLERANCE)
    one, two = (load_file(folder / run / "final.safetensors") for run in ("one", "two"))
    assert all((two[key] - value).abs().max() <= TOLERANCE * value.abs().max() for key, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [None, (2.0, 2.5, 3.0)])
def test_a_scan_is_shared(folder, spacing):
    name = f"net-{spacing is None}"
    train(configured(folder, name, steps=1, spacing=spacing))
    scan = min((folder / "data" / "imagesTr").glob("*.nii.gz"))
    common = ["-m", "effseg", "predict", "--checkpoint", folder / name, "--input", scan, "--device", "cpu"]
    files = [folder / f"{name}-{how}.nii.gz" for how in ("alone", "shared")]
    subprocess.run([sys.executable, *map(str, common), "--output", str(files[0])], check=True)
    run(2, *common, "--output", files[1], "--split-volume")
    alone, shared = (np.asarray(nibabel.load(file).dataobj) for file in files)
    assert (alone == shared).all()


def test_processes_that_cannot_be_divided_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="split_volume: expected a divisor of 3"), join_world("cpu", 2):
        pass


@pytest.mark.parametrize("values", [{"patch_size": (8, 8, 8)}, {"model": "unet3d"}, {"split_volume": 0}])
def test_what_cannot_be_shared_is_refused(tmp_path, values):
    values = {"split_volume": 2, "model": "effseg-tiny"} | values
    with pytest.raises(InputError, match="split_volume: expected"):
        TrainingConfig(data=tmp_path, output=tmp_path / "run", **values)
