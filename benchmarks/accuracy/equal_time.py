"""`python -m benchmarks.accuracy`: what whole volumes and patches learn in the same time.

effseg-base trains on whole volumes, the 3D U-Net on patches, and both are scored on cases that neither has
seen, with the weights of the last step: nothing is chosen by those cases.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from effseg import phantom
from effseg.benchmarking import record
from effseg.common.arguments import Parser
from effseg.common.atomic import atomic_path
from effseg.common.device import find_device
from effseg.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from effseg.training import TrainingConfig, TrainingResult
    from effseg.training.data import TrainingData

WHOLE, PATCHES = "effseg-base", "unet3d"
FILE = "accuracy.json"
NEEDED = ("nibabel", "monai", "matplotlib", "rich", "safetensors", "scipy", "tensorboardX")
PROBE_STEPS, WARM = 12, 4
"""Steps that are timed, the first ones of which do not count."""
SPARE = 0.05
"""Of the time, for what the timed steps did not show."""

HELP = """Train effseg-base on whole volumes and the 3D U-Net on patches for the same time, and write the
steps, voxels per second and memory of both, and their Dice on unseen cases, to DIR/accuracy.json."""

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """shape: of a phantom; training, validation: how many; patch_size: the 3D U-Net's."""

    shape: Triple = (128, 96, 96)
    training: int = 32
    validation: int = 8
    patch_size: Triple = (64, 64, 64)


class Pace(NamedTuple):
    """Seconds of a training step, and of a validation."""

    step: float
    validation: float


def compare(
    output: Path,
    minutes: float,
    data: Path | None = None,
    device: str = "auto",
    plan: Plan | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """What is written to accuracy.json, also after the first network. Raises InputError as training does.

    minutes: about how long all of it takes. data: a folder as `effseg train` takes it, whose first fold
    validates; None: phantoms. The runs themselves are not kept.
    """
    if not (math.isfinite(minutes) and minutes > 0):
        raise InputError(f"--minutes: expected more than 0, got {minutes:g}")
    plan, where = plan or Plan(), find_device(device)
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="effseg-accuracy-") as scratch:
        configs = _configs(Path(scratch), plan, data, device)
        known = _prepared(configs[WHOLE])
        paces = {name: _pace(config, console) for name, config in configs.items()}
        spent_otherwise = sum(pace.validation for pace in paces.values()) + 60 * minutes * SPARE
        share = max(0.0, deadline - time.monotonic() - spent_otherwise) / len(configs)
        found = _begun(minutes, data, plan, known, where)
        for name, config in configs.items():
            steps = max(1, int(share / paces[name].step))
            result = _trained(config.replace(steps=steps), where, console)
            found["networks"][name] = _row(config.patch_size, steps, result, known, where)
            _write(found, output / FILE)
    return found


def _configs(scratch: Path, plan: Plan, data: Path | None, device: str) -> dict[str, TrainingConfig]:
    from effseg.training import TrainingConfig

    options: dict[str, Any] = {}
    if data is None:
        data = phantom.write_dataset(
            scratch / "phantoms", plan.training + plan.validation, plan.shape, unseen=0
        )
        names = [f"phantom_{number:03d}" for number in range(plan.training + plan.validation)]
        # A crop to the body could leave less than a patch.
        options = {"validation": ",".join(names[plan.training :]), "crop": "none"}
    return {
        name: TrainingConfig(
            data=data,
            output=scratch / name,
            model=name,
            patch_size=patch_size,
            cache=scratch / "cache",
            workers=max(1, min(8, (os.cpu_count() or 1) - 1)),
            device=device,
            **options,
        )
        for name, patch_size in ((WHOLE, None), (PATCHES, plan.patch_size))
    }


def _prepared(config: TrainingConfig) -> TrainingData:
    """The cases, which are in the runs' cache from now on."""
    from effseg.training.data import load_training_data
    from effseg.training.distributed import join_world

    with join_world("cpu") as world:
        return load_training_data(config, world, lambda text: None)


def _pace(config: TrainingConfig, console: Console | None) -> Pace:
    """By a short run."""
    from effseg.training.records import read_rows

    probe = config.replace(output=config.output.with_name(f"{config.output.name}-probe"))
    _run(probe.replace(steps=PROBE_STEPS), console)
    # The time of the last step's row is that after the validation.
    seconds = [float(row["seconds"]) for row in read_rows(probe.output / "progress.csv")]
    step = max(1e-3, (seconds[-2] - seconds[WARM - 1]) / (PROBE_STEPS - 1 - WARM))
    return Pace(step, max(0.0, seconds[-1] - seconds[-2] - step))


def _trained(config: TrainingConfig, device: torch.device, console: Console | None) -> TrainingResult:
    if device.type == "cuda":
        gc.collect()  # what the run before has left
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return _run(config, console)


def _run(config: TrainingConfig, console: Console | None) -> TrainingResult:
    """With one validation, at the end."""
    from effseg.training import train

    ends = {"validation_interval": config.steps, "checkpoint_interval": config.steps}
    return train(config.replace(**ends), console=console)


# What is written


def _begun(
    minutes: float, data: Path | None, plan: Plan, known: TrainingData, device: torch.device
) -> dict[str, Any]:
    """Without networks. A data folder's name says where it lies: that is nobody's business."""
    shape = "x".join(map(str, plan.shape))
    begun = record.begin(
        data=f"phantoms {shape}" if data is None else "a folder of scans",
        training_cases=len(known.training),
        validation_cases=len(known.validation),
        minutes=minutes,
        device=device.type,
        dtype="bf16" if device.type == "cuda" else "fp32",
    ).to_dict()
    document = {name: begun[name] for name in ("machine", "versions", "conditions")}
    return document | {"organs": list(known.organs), "networks": {}}


def _row(
    patch_size: Triple | None, steps: int, result: TrainingResult, known: TrainingData, device: torch.device
) -> dict[str, Any]:
    """dice: of each organ the mean over the validation cases that have it. peak_bytes_allocated: of training
    and validation; a CPU's is not known."""
    from effseg.training.records import mean_dice

    voxels = (
        np.mean([case.labels.size for case in known.training])
        if patch_size is None
        else math.prod(patch_size)
    )
    return {
        "patch_size": patch_size and list(patch_size),
        "steps": steps,
        "skipped_steps": result.skipped,
        "training_seconds": steps / result.steps_per_second,
        "voxels_per_second": float(voxels) * result.steps_per_second,
        "mean_dice": _number(mean_dice(list(result.final_dice.values()))),
        "dice": {organ: _number(value) for organ, value in result.final_dice.items()},
        "peak_bytes_allocated": result.peak_memory if device.type == "cuda" else None,
    }


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _is_complete(path: Path) -> bool:
    if not path.exists():
        return False
    networks: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["networks"]
    return networks.keys() == {WHOLE, PATCHES}


def _write(document: Mapping[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


# The command


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.accuracy", description=HELP)
    parser.add_argument(
        "--minutes", type=float, default=8.0, metavar="N", help="all of it takes about so long (default: 8)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of accuracy.json")
    parser.add_argument("--data", type=Path, metavar="DIR", help="scans with labels; default: phantoms")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:N; default: the GPU if there is one"
    )
    parser.add_argument("--resume", action="store_true", help="do nothing where DIR has the results of both")
    args = parser.parse_args(argv)
    if args.resume and _is_complete(args.output / FILE):
        print(f"{args.output / FILE} has both")
        return 0
    for module in NEEDED:
        if importlib.util.find_spec(module) is None:
            print(f"skipped: {module} is not installed")
            return 0
    from rich.console import Console

    try:
        found = compare(args.output, args.minutes, args.data, args.device, console=Console())
    except (InputError, OSError) as error:
        print(f"accuracy: error: {error}", file=sys.stderr)
        return 2
    for name, row in found["networks"].items():
        print(f"{name}: {_told(row)}")
    print(args.output / FILE)
    return 0


def _told(row: Mapping[str, Any]) -> str:
    size = (
        "whole volumes"
        if row["patch_size"] is None
        else f"patches of {'x'.join(map(str, row['patch_size']))}"
    )
    dice = "no organ to score" if row["mean_dice"] is None else f"mean Dice {row['mean_dice']:.3f}"
    return f"{row['steps']} steps on {size} in {row['training_seconds']:.0f} s, {dice}"


if __name__ == "__main__":
    sys.exit(main())
