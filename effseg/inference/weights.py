"""Files of weights, by the names that people give."""

from pathlib import Path

from effseg.common.run_folder import WEIGHTS, has_begun
from effseg.errors import InputError


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
    """Files of a folder of runs, a run's each, by name; of anything else the one of `weights_file`.

    Links to other runs of the folder do not count. Raises InputError where there is none, or a run that has
    not ended: named alone, its best network so far is taken.
    """
    if not checkpoint.is_dir() or _of_run(checkpoint) is not None or has_begun(checkpoint):
        return [weights_file(checkpoint)]
    runs = []
    for path in sorted(path for path in checkpoint.iterdir() if path.is_dir()):
        if path.is_symlink() and path.resolve().parent == checkpoint.resolve():
            continue
        if has_begun(path) and not (path / WEIGHTS[-1]).is_file():
            raise InputError(f"{path}: a run that has not ended, without {WEIGHTS[-1]}")
        if _of_run(path) is not None:
            runs.append(path)
    return [weights_file(path) for path in runs or [checkpoint]]


def _of_run(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
