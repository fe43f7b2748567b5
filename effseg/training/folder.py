"""The folder of a run: what it holds, and when it may be written to."""

import json
import os
import shutil
from pathlib import Path

from effseg.common.atomic import atomic_path
from effseg.common.run_folder import FILES, FOLDERS, holds_run
from effseg.errors import InputError
from effseg.training.config import TrainingConfig


def open_run(config: TrainingConfig, overwrite: bool = False) -> None:
    """Make `config.output`, a folder that is there, one in which a run of `config` can begin or continue.

    overwrite: a run that is there is not continued; `remove_run` is called when another can begin. Raises
    InputError when the folder holds a run of another configuration or cannot be written.
    """
    folder = config.output
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: expected a folder that can be written to")
    for place in (folder, folder / "overlays", folder / "cache"):
        for leftover in place.glob(".writing-*"):  # a file that a killed process was about to write
            leftover.unlink()
    if overwrite:
        return
    if (folder / "config.json").exists():
        config.check_continues(read_config(folder))
    elif holds_run(folder):
        raise InputError(f"{folder} holds parts of a run without its config.json: overwrite it")


def write_config(config: TrainingConfig) -> None:
    """Write RUN/config.json: from now on the folder is this run's."""
    with atomic_path(config.output / "config.json") as temporary:
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> TrainingConfig:
    """The configuration of the run in `folder`. Raises InputError when it cannot be read."""
    path = folder / "config.json"
    try:
        return TrainingConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: expected a training configuration, got: {error}") from error


def remove_run(folder: Path) -> None:
    """Remove all that a run has written, but for prepared volumes."""
    # The configuration goes last, so that a kill in between leaves a folder that still reads as a run.
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in reversed(FILES):
        (folder / name).unlink(missing_ok=True)
