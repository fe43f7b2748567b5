"""The folder of a run: what it holds, and when it may be written to."""

import json
import os
import shutil
from pathlib import Path

from effseg.atomic import atomic_path
from effseg.errors import InputError
from effseg.training.config import TrainingConfig

# All that a run writes, beside prepared volumes in cache/, which serve any run; nothing else is ever touched.
FILES = ("config.json", "progress.csv", "curves.png", "best.safetensors", "final.safetensors")
FOLDERS = ("checkpoints", "tensorboard", "overlays")


def open_run(config: TrainingConfig, overwrite: bool = False) -> None:
    """Make `config.output` a folder in which a run of `config` can begin or continue.

    overwrite: remove a run that is there. Raises InputError when the folder holds a run of another
    configuration or cannot be written.
    """
    folder = config.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: expected a folder that can be made, got: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: expected a folder that can be written to")
    for place in (folder, folder / "overlays", folder / "cache"):
        for leftover in place.glob(".writing-*"):  # a file that a killed process was about to write
            leftover.unlink()
    if overwrite:
        _remove_run(folder)
    if (folder / "config.json").exists():
        config.check_continues(read_config(folder))
    elif _is_run(folder):
        raise InputError(f"{folder} holds parts of a run without its config.json: overwrite it")


def write_config(config: TrainingConfig) -> None:
    """Write RUN/config.json: from now on the folder is this run's."""
    with atomic_path(config.output / "config.json") as temporary:
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(folder: Path) -> TrainingConfig:
    """The configuration of the run in `folder`. Raises InputError when it cannot be read."""
    path = folder / "config.json"
    try:
        return TrainingConfig.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: expected a training configuration, got: {error}") from error


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILES + FOLDERS)


def _remove_run(folder: Path) -> None:
    # The configuration goes last, so that a kill in between leaves a folder that still reads as a run.
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in reversed(FILES):
        (folder / name).unlink(missing_ok=True)
