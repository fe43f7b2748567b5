"""Files of weights, by the names that people give."""

from pathlib import Path

from effseg.errors import InputError

NAMES = ("best.safetensors", "final.safetensors")


def weights_file(checkpoint: Path) -> Path:
    """A .safetensors file itself; of a run's folder its best network, else its final one. Raises InputError
    where there is none."""
    if not checkpoint.is_dir():
        if not checkpoint.exists():
            raise InputError(f"{checkpoint}: no such checkpoint or run folder")
        return checkpoint
    found = _of_run(checkpoint)
    if found is not None:
        return found
    raise InputError(f"{checkpoint}: a folder without best.safetensors or final.safetensors")


def weights_files(checkpoint: Path) -> list[Path]:
    """Files of a folder of runs, a run's each, by name; of anything else the one of `weights_file`. Raises
    InputError where there is none, or a run without one."""
    runs = []
    if checkpoint.is_dir() and _of_run(checkpoint) is None:
        folders = sorted(path for path in checkpoint.iterdir() if path.is_dir())
        runs = [path for path in folders if (path / "config.json").exists() or _of_run(path) is not None]
    return [weights_file(path) for path in runs or [checkpoint]]


def _of_run(folder: Path) -> Path | None:
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)
