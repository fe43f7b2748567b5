"""Training steps on a whole CT, not cropped, not resampled: does it fit, what does it take, does it learn?

    python benchmarks/full_size_step.py --image case_ct.nii.gz --labels case_seg.nii.gz --json step.json

Every step is forward, loss, backward and AdamW on the whole scan, on the CPU. They run in a process of
their own, whose peak resident memory (scan, interpreter and libraries included) is printed beside the peak
that `effseg.peak_training_memory` predicts for the tensors, and beside what a 3D U-Net would need for the
same volume (predicted, not run). Threads are torch's: set OMP_NUM_THREADS.
"""

import argparse
import json
import math
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from effseg import EffSegNet, UNet3D, peak_training_memory
from effseg.benchmarking.record import processor
from effseg.common.atomic import atomic_path
from effseg.common.device import keep_freed_memory, trim_freed_memory
from effseg.data.nifti import read_image, read_labels
from effseg.data.preprocessing import CROPS, Preprocessing
from effseg.errors import InputError
from effseg.models.levels import PRESETS

GB = 1e9


@dataclass(frozen=True)
class Settings:
    """classes: of the network; None: those of the label file."""

    image: str
    labels: str
    crop: str
    preset: str
    memory: str
    recompute_levels: int
    classes: int | None
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Run:
    """What the training process reports; peak_resident_bytes is the operating system's figure for it,
    resident_before_bytes what it was once scan, network and optimizer were ready."""

    shape: tuple[int, ...]
    classes: int
    losses: list[float]
    seconds: list[float]
    resident_before_bytes: int
    peak_resident_bytes: int
    threads: int


def make_network(settings: Settings, channels: int, classes: int) -> EffSegNet:
    recompute = settings.recompute_levels
    return EffSegNet(channels, classes, settings.preset, memory=settings.memory, recompute=recompute)


def read_batch(settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (1, C, D, H, W) float32, its HU window scaled, and labels (1, D, H, W) as in the file."""
    preprocessing = Preprocessing(crop=settings.crop)
    scan = read_image(settings.image)
    prepared = preprocessing.prepare(scan)
    labels = preprocessing.prepare_labels(read_labels(settings.labels, like=scan), prepared)
    return preprocessing.normalise(prepared.image)[None], torch.from_numpy(labels.copy())[None]


def train(settings: Settings) -> Run:
    keep_freed_memory()
    torch.manual_seed(0)
    image, labels = read_batch(settings)
    classes = settings.classes or max(2, int(labels.max()) + 1)
    model = make_network(settings, image.shape[1], classes)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=1e-4)
    before = peak_resident()
    losses, seconds = [], []
    for step in range(settings.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(image, labels)
        loss.backward()
        optimizer.step()
        trim_freed_memory()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        print(f"step {step + 1}: loss {losses[-1]:.5f}, {seconds[-1]:.1f} s", flush=True)
    return Run(tuple(image.shape), classes, losses, seconds, before, peak_resident(), torch.get_num_threads())


def peak_resident() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(settings: Settings, run: Run) -> dict[str, Any]:
    """Everything that is worth keeping; files by their names alone."""
    ours = peak_training_memory(
        partial(make_network, settings, run.shape[1], run.classes), run.shape, dtype="fp32"
    )
    unet = peak_training_memory(lambda: UNet3D(run.shape[1], run.classes), run.shape, dtype="fp32")
    voxels = ours.voxels
    options = asdict(settings) | {
        "image": Path(settings.image).name,
        "labels": Path(settings.labels).name,
        "classes": run.classes,
    }
    return {
        "machine": {
            "cpu": processor(),
            "threads": run.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "settings": options | {"dtype": "fp32", "optimizer": "adamw"},
        "shape": run.shape,
        "losses": run.losses,
        "seconds_per_step": run.seconds,
        "resident_before_bytes": run.resident_before_bytes,
        "peak_resident_bytes": run.peak_resident_bytes,
        "peak_resident_bytes_per_voxel": run.peak_resident_bytes / voxels,
        "predicted_peak_bytes": ours.peak,
        "predicted_bytes_per_voxel": ours.bytes_per_voxel,
        "unet3d_predicted_peak_bytes": unet.peak,
        "unet3d_predicted_bytes_per_voxel": unet.bytes_per_voxel,
    }


def show(report: dict[str, Any]) -> None:
    voxels = math.prod(report["shape"][2:]) * report["shape"][0]
    print(f"volume: {'x'.join(map(str, report['shape']))}, {report['settings']['classes']} classes, fp32")
    for what, key in (
        ("peak resident memory of the process", "peak_resident_bytes"),
        ("predicted peak of the tensors", "predicted_peak_bytes"),
        ("predicted peak of a 3D U-Net", "unet3d_predicted_peak_bytes"),
    ):
        print(f"{what}: {report[key] / GB:.2f} GB, {report[key] / voxels:.1f} B/voxel")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--image", required=True, help="CT, NIfTI")
    parser.add_argument("--labels", required=True, help="label map on the same grid, classes 0, 1, 2 ...")
    parser.add_argument("--crop", choices=CROPS, default="none")
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--memory", choices=("raw", "stream"), default="stream")
    parser.add_argument("--recompute-levels", type=int, default=0)
    parser.add_argument("--classes", type=int, help="of the network; default: as many as the label map has")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def main() -> int:
    options = vars(arguments())
    path = options.pop("json")
    settings = Settings(**options)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            run = pool.submit(train, settings).result()
    except InputError as error:
        print(f"full_size_step: error: {error}", file=sys.stderr)
        return 2
    report = describe(settings, run)
    show(report)
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
