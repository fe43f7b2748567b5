"""From raw scans to scores with nnU-Net's commands, as documented."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from effseg.nnunet import TRAINERS, VARIABLE
from effseg.phantom import write_dataset

PROGRAM = Path(__file__).parents[1] / "with_nnunet.py"
TRAINERS_TO_RUN = ("nnUNetTrainerEffSeg", "nnUNetTrainerEffSegFull")
SPLITS = [{"train": ["phantom_000", "phantom_001"], "val": ["phantom_002"]}]  # five folds need five cases
WORKERS = ("-npp", "1", "-nps", "1")
METRICS = {"Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def effseg(tmp_path_factory):
    """Runs an effseg command on a dataset that is planned and preprocessed."""
    home = tmp_path_factory.mktemp("nnunet")
    settings = {f"nnUNet_{name}": str(home / name) for name in ("raw", "preprocessed", "results")}
    settings |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1", "OMP_NUM_THREADS": "1"}
    settings |= {"EFFSEG_NNUNET_EPOCHS": "2", "EFFSEG_NNUNET_ITERATIONS": "2"}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *map(str, arguments)],
            env=os.environ | settings, cwd=home, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    write_dataset(home / "raw" / "Dataset901_Phantoms", cases=3, shape=(48, 48, 48), unseen=1)
    run("nnunet", "plan_and_preprocess", "-d", "901", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    (home / "preprocessed" / "Dataset901_Phantoms" / "splits_final.json").write_text(json.dumps(SPLITS))
    run.home, run.settings = home, settings
    return run


@pytest.fixture(scope="module", params=TRAINERS_TO_RUN)
def trained(effseg, request):
    """A trainer's name and the folder of its fold."""
    effseg("nnunet", "train", "901", "3d_fullres", "0", "-tr", request.param, "-device", "cpu")
    model = f"{request.param}__nnUNetPlans__3d_fullres"
    return request.param, effseg.home / "results" / "Dataset901_Phantoms" / model / "fold_0"


def test_training_leaves_nnunets_files(trained):
    _, fold = trained
    for name in ("checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "debug.json"):
        assert (fold / name).is_file()
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert set(summary["foreground_mean"]) == METRICS
    assert len(summary["mean"]) == 10
    (case,) = summary["metric_per_case"]
    assert case["prediction_file"].endswith("validation/phantom_002.nii.gz")


def test_validation_can_be_run_again(effseg, trained):
    trainer, fold = trained
    summary = (fold / "validation" / "summary.json").read_text()
    effseg("nnunet", "train", "901", "3d_fullres", "0", "-tr", trainer, "-device", "cpu", "--val")
    assert (fold / "validation" / "summary.json").read_text() == summary


def test_prediction_and_nnunets_evaluation(effseg, trained):
    trainer, _ = trained
    raw, output = effseg.home / "raw" / "Dataset901_Phantoms", effseg.home / trainer
    effseg(
        "nnunet", "predict", "-d", "901", "-c", "3d_fullres", "-f", "0", "-tr", trainer,
        "-i", raw / "imagesTs", "-o", output, "-device", "cpu", *WORKERS, "--disable_tta",
    )  # fmt: skip
    scan, labels = (
        nibabel.load(path)
        for path in (raw / "imagesTs" / "phantom_003_0000.nii.gz", output / "phantom_003.nii.gz")
    )
    assert labels.shape == scan.shape
    np.testing.assert_allclose(labels.affine, scan.affine, atol=1e-5)
    evaluate = Path(sys.executable).with_name("nnUNetv2_evaluate_folder")
    about = ("-djfile", output / "dataset.json", "-pfile", output / "plans.json")
    subprocess.run(
        [evaluate, raw / "labelsTs", output, *about],
        env=os.environ | effseg.common.settings, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert set(json.loads((output / "summary.json").read_text())["foreground_mean"]) == METRICS


def test_probabilities_and_classes_agree(effseg):
    """Of whole volumes: with probabilities the logits take nnU-Net's own way out."""
    trainer, raw = TRAINERS_TO_RUN[1], effseg.home / "raw" / "Dataset901_Phantoms"
    found = {}
    for output, options in (("classes", ()), ("probabilities", ("--save_probabilities",))):
        effseg(
            "nnunet", "predict", "-d", "901", "-c", "3d_fullres", "-f", "0", "-tr", trainer,
            "-i", raw / "imagesTs", "-o", effseg.home / output, "-device", "cpu", *WORKERS, *options,
        )  # fmt: skip
        found[output] = nibabel.load(effseg.home / output / "phantom_003.nii.gz").get_fdata()
    np.testing.assert_array_equal(found["classes"], found["probabilities"])
    assert np.load(effseg.home / "probabilities" / "phantom_003.npz")["probabilities"].shape[0] == 11


def test_the_folder_of_trainers_is_told():
    """For nnUNetv2_train itself."""
    program = "import effseg.nnunet; print(effseg.nnunet.TRAINERS)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == TRAINERS
    assert VARIABLE == "nnUNet_extTrainer"
