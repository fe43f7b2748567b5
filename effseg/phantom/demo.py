"""The whole way in a few minutes on a CPU: phantoms, training, a segmented scan, scores, and the memory."""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from effseg import phantom
from effseg.errors import InputError
from effseg.models.registry import build_model

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MODEL, BASELINE = "effseg-base", "unet3d"
FEWEST_STEPS, MOST_STEPS = 200, 400  # fewer miss the adrenal glands, more gain little
FULL_SIZE = (512, 512, 512)


@dataclass(frozen=True)
class Plan:
    """Size of a demonstration: voxels of a phantom along R, A, S, how many train and how many validate."""

    shape: tuple[int, int, int] = (64, 48, 48)
    training: int = 40
    validation: int = 4

    @property
    def cases(self) -> int:
        return self.training + self.validation


@dataclass(frozen=True)
class DemoResult:
    """What came of it.

    dice: organ -> Dice on the unseen phantom, NaN for an organ that neither it nor the segmentation shows.
    summary: as of `effseg.evaluation.folders.evaluate_folders`. segmentation, overlay, run: what was written.
    """

    dice: dict[str, float]
    mean_dice: float
    steps: int
    summary: dict[str, Any]
    segmentation: Path
    overlay: Path
    run: Path


def run_demo(
    output: Path,
    minutes: float = 6.0,
    seed: int = 0,
    plan: Plan | None = None,
    console: "Console | None" = None,
) -> DemoResult:
    """Make phantoms, train `effseg-base` on them on the CPU, segment an unseen one and score it.

    Args:
        output: folder for ``phantoms/`` (nnU-Net's layout), ``run/``, ``segmentation/`` and ``overlay.png``;
            an earlier demonstration there is replaced.
        minutes: about the longest that training may take. On a fast machine `MOST_STEPS` steps end it
            earlier; on a slow one `FEWEST_STEPS` are taken nevertheless.
        seed: of the phantoms and of the training.
        plan: size of the phantoms and how many; None: the usual one.
        console: where to print; None prints nothing.

    Raises: InputError for minutes or a seed out of range, or an output that cannot be used.
    """
    from rich.console import Console

    from effseg.training import TrainingConfig, train

    if not (math.isfinite(minutes) and minutes > 0):
        raise InputError(f"minutes: expected more than 0, got {minutes}")
    plan = plan or Plan()
    console = console or Console(quiet=True)
    data = phantom.write_dataset(output / "phantoms", plan.cases, plan.shape, seed)
    steps = affordable_steps(60 * minutes, plan.shape)
    console.print(
        f"{plan.cases} phantoms of {_size(plan.shape)} voxels, {phantom.spacing(plan.shape):.1f} mm, "
        f"{len(phantom.NAMES) - 1} organs, in {data}",
        highlight=False,
        soft_wrap=True,
    )
    names = [f"phantom_{number:03d}" for number in range(plan.cases)]
    config = TrainingConfig(
        data=data,
        output=output / "run",
        model=MODEL,
        cases=",".join(names),
        validation=",".join(names[plan.training :]),
        steps=steps,
        validation_interval=math.ceil(steps / 4),
        checkpoint_interval=math.ceil(steps / 4),
        augment=False,  # every phantom is another body already
        dtype="fp32",
        device="cpu",
        seed=seed,
    )
    train(config, overwrite=True, console=console)
    result = _segment_unseen(output, data, f"phantom_{plan.cases:03d}", steps)

    from effseg.evaluation.folders import summary_table

    console.print(summary_table(result.summary))
    console.print(memory_table(plan.shape, FULL_SIZE))
    console.print(
        f"Mean Dice {result.mean_dice:.3f} on a phantom never seen in training.\n"
        f"labels {result.segmentation}\npicture {result.overlay}\ntraining {result.run}",
        highlight=False,
        soft_wrap=True,
    )
    return result


def affordable_steps(seconds: float, shape: tuple[int, int, int]) -> int:
    """Training steps that fit into so many seconds here, judged by a few; within the demo's limits."""
    model = build_model(MODEL, 1, len(phantom.NAMES))
    image = torch.randn(1, 1, *shape)
    labels = torch.randint(len(phantom.NAMES), (1, *shape), dtype=torch.uint8)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        model.loss(image, labels).backward()
        times.append(time.perf_counter() - start)
    # The air that the crop takes away makes up for the optimizer, validation and ever other sizes.
    return max(FEWEST_STEPS, min(MOST_STEPS, int(seconds / min(times))))


def memory_table(*shapes: tuple[int, int, int]) -> "Table":
    """Predicted peak memory of a training step in bf16, `effseg-base` against the 3D U-Net, by volume."""
    from rich.table import Table

    from effseg.memory import peak_training_memory
    from effseg.memory.units import format_bytes

    classes = len(phantom.NAMES)
    table = Table(title=f"memory of one training step: bf16, AdamW, batch 1, {classes} classes, predicted")
    table.add_column("volume")
    for name in (MODEL, BASELINE, "share"):
        table.add_column(name, justify="right")
    parameters: list[int] = []
    for shape in shapes:
        reports = [
            peak_training_memory(partial(build_model, name, 1, classes), (1, 1, *shape), dtype="bf16")
            for name in (MODEL, BASELINE)
        ]
        cells = [f"{format_bytes(report.peak)}, {report.bytes_per_voxel:.0f} B/voxel" for report in reports]
        table.add_row(_size(shape), *cells, f"{reports[0].peak / reports[1].peak:.1%}")
        parameters = [report.parameters for report in reports]
    cells = [f"{count / 1e6:.2f} M" for count in parameters]
    table.add_row("parameters", *cells, f"{parameters[0] / parameters[1]:.1%}")
    return table


def _segment_unseen(output: Path, data: Path, name: str, steps: int) -> DemoResult:
    """Segment, score and draw the phantom that no training case is."""
    from effseg.data.labels import load_label_map
    from effseg.data.nifti import read_image, read_labels
    from effseg.evaluation.folders import evaluate_folders
    from effseg.figures import draw_overlay
    from effseg.inference import load_predictor, predict_files

    image_file = data / "imagesTs" / f"{name}_0000.nii.gz"
    predictor = load_predictor(output / "run")
    (segmentation,) = predict_files(predictor, image_file, output / "segmentation", overwrite=True)
    label_map = load_label_map(data)
    scan = read_image(image_file)
    summary = evaluate_folders(
        output / "segmentation",
        data / "labelsTs",
        label_map,
        tolerance_mm=round(max(scan.spacing), 1),  # a voxel
        cases=name,
    )
    draw_overlay(
        scan.array,
        label_map.to_classes(read_labels(segmentation, like=scan)),
        label_map.names,
        output / "overlay.png",
        reference=label_map.to_classes(read_labels(data / "labelsTs" / f"{name}.nii.gz", like=scan)),
        spacing=scan.spacing,
    )
    return DemoResult(
        dice={organ: summary["mean"][value]["Dice"] for value, organ in summary["names"].items()},
        mean_dice=summary["foreground_mean"]["Dice"],
        steps=steps,
        summary=summary,
        segmentation=segmentation,
        overlay=output / "overlay.png",
        run=output / "run",
    )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
