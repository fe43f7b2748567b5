"""A whole CT in Python: NIfTI files in any orientation, training, a checkpoint, labels on the
scan's own grid.

What `effseg train`, `predict` and `evaluate` do, as a program to change: `python -m
effseg.examples.whole_ct` takes a minute on a CPU. Phantoms stand for patients; put folders of
your own in place of `write_dataset`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

import effseg
from effseg import phantom
from effseg.data.cases import find_cases
from effseg.data.labels import LabelMap, load_label_map
from effseg.data.nifti import read_image, read_labels
from effseg.data.preprocessing import Preprocessing
from effseg.evaluation.folders import evaluate_folders
from effseg.inference import load_predictor, predict_files

SHAPE = (48, 32, 48)
CASES = 6
STEPS = 60
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder))


def run(folder: Path) -> None:
    torch.manual_seed(0)
    data = phantom.write_dataset(folder / "data", CASES, SHAPE)
    label_map = load_label_map(data)  # values in the files <-> classes 0 ... K-1
    preprocessing = Preprocessing(window=(-200, 400), crop="body")  # HU; margins in mm
    model = effseg.EffSegNet(1, label_map.num_classes, memory="stream").to(DEVICE)

    train(model, prepared(data, preprocessing, label_map))
    model.save(folder / "network.safetensors", preprocessing=preprocessing, labels=label_map)

    predictor = load_predictor(folder / "network.safetensors", DEVICE)
    (written,) = predict_files(predictor, data / "imagesTs", folder / "found")
    scan = read_image(data / "imagesTs" / f"phantom_{CASES:03d}_0000.nii.gz")
    assert read_labels(written, like=scan).shape == scan.array.shape[1:]  # on the scan's own grid
    scores = evaluate_folders(folder / "found", data / "labelsTs", label_map, tolerance_mm=3.0)
    print(f"mean Dice on an unseen phantom: {scores['foreground_mean']['Dice']:.3f}")


def prepared(
    data: Path, preprocessing: Preprocessing, label_map: LabelMap
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (1, 1, D, H, W), float32, and labels (1, D, H, W), uint8, cropped to the body: each
    of its own size."""
    pairs = []
    for case in find_cases(data, labelled=True):
        assert case.labels is not None
        scan = read_image(case.images)  # (C, X, Y, Z) in RAS+, HU
        labels = label_map.to_classes(read_labels(case.labels, like=scan), case.labels)
        part = preprocessing.prepare(scan, wanted=labels > 0)  # labels are never cut off
        image = preprocessing.normalise(part.image)
        classes = torch.from_numpy(np.ascontiguousarray(preprocessing.prepare_labels(labels, part)))
        pairs.append((image[None].to(DEVICE), classes[None].to(DEVICE)))
    return pairs


def train(model: effseg.EffSegNet, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Whole volumes, one a step; any optimizer will do."""
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        image, labels = pairs[step % len(pairs)]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = model.loss(image, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: {'x'.join(map(str, image.shape[2:]))} voxels, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
