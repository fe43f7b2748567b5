"""nnU-Net's own way with a converted network, on phantoms: plan, train, predict, score.

    pip install 'effseg[nnunet]'
    python -m effseg.examples.nnunet_training FOLDER

What a user does with `effseg nnunet`, as a program. Five epochs of ten steps show that it runs
and not what it can: nnU-Net trains for 1000 epochs of 250. On a torch without CUDA, training
needs torchvision's CPU build.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from effseg.data.labels import load_label_map
from effseg.evaluation.folders import evaluate_folders
from effseg.phantom import write_dataset

DATASET = "Dataset901_Phantoms"
SHAPE = (48, 48, 48)
CASES = 5  # nnU-Net makes five folds
CONFIGURATION = "3d_fullres"


def main(folder: Path) -> None:
    if find_spec("nnunetv2") is None:
        sys.exit("nnU-Net is not installed: pip install 'effseg[nnunet]'")
    environment = settings(folder)
    raw = write_dataset(folder / "raw" / DATASET, CASES, SHAPE)
    for arguments in steps(raw, folder / "found"):
        print("effseg", *arguments, flush=True)
        subprocess.run([sys.executable, "-m", "effseg", *arguments], env=environment, check=True)
    scores = evaluate_folders(folder / "found", raw / "labelsTs", load_label_map(raw), tolerance_mm=3.0)
    print(f"mean Dice on an unseen phantom: {scores['foreground_mean']['Dice']:.3f}")


def settings(folder: Path) -> dict[str, str]:
    """nnU-Net's folders, this package's options, and few processes: nnU-Net reads all from the
    environment."""
    return os.environ | {
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_def_n_proc": "2",
        "nnUNet_n_proc_DA": "2",
        "EFFSEG_MEMORY": "raw",  # or block, auto; with auto EFFSEG_MEMORY_BUDGET=24GB
        "EFFSEG_NNUNET_EPOCHS": "5",
        "EFFSEG_NNUNET_ITERATIONS": "10",
    }


def steps(raw: Path, output: Path) -> list[list[str]]:
    """The commands, as arguments of effseg. Trainer: nnUNetTrainerEffSeg, nnU-Net's own with a
    converted network; `-tr nnUNetTrainerEffSegFull` would train an EffSegNet on whole volumes."""
    number, device = str(int(DATASET[7:10])), "cuda" if shutil.which("nvidia-smi") else "cpu"
    return [
        ["nnunet", "plan_and_preprocess", "-d", number, "-c", CONFIGURATION, "-np", "1", "-npfp", "1"],
        ["nnunet", "train", number, CONFIGURATION, "0", "-device", device],
        [
            "nnunet", "predict", "-d", number, "-c", CONFIGURATION, "-f", "0", "-i", str(raw / "imagesTs"),
            "-o", str(output), "-device", device,
        ],
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m effseg.examples.nnunet_training")
    parser.add_argument("folder", type=Path, help="for data, models and results")
    main(parser.parse_args().folder)
