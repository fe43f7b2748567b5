"""Checkpoints that are whole or absent, whenever the process is killed.

A checkpoint is a folder ``step-00000120`` of ``model.safetensors`` and ``state.pt``. It is written under
another name, flushed to disk and renamed; only then are older ones removed. So the newest folder of that name
is always whole, and a kill costs the steps since it.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from effseg.errors import InputError

_NAME = re.compile(r"step-(\d{8})")
_WRITING = ".writing-"


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> Path | None:
        """The newest checkpoint's folder, or None."""
        return max(self._all(), default=None, key=_step)

    def save(self, step: int, model: Any, state: dict[str, Any], extra: dict[str, Any]) -> Path:
        """Write the checkpoint of `step` done steps, then remove the older ones.

        model: has ``save(path, extra)``. state: tensors and plain values only, see `load_state`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{step:08d}"
        temporary = self.folder / (_WRITING + target.name)
        temporary.mkdir()
        try:
            with writing(target):
                model.save(temporary / "model.safetensors", extra=extra)
                torch.save(state, temporary / "state.pt")
                for file in (temporary / "model.safetensors", temporary / "state.pt", temporary):
                    _flush(file)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush(self.folder)
        for older in self._all():
            if older != target:
                shutil.rmtree(older)
        return target

    def clean(self) -> None:
        """Remove what a kill left: half-written checkpoints and older ones not yet removed."""
        newest = self.newest()
        for path in list(self.folder.glob(_WRITING + "*")) + self._all():
            if path != newest:
                shutil.rmtree(path)

    def _all(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line why `path` cannot be written; torch and safetensors have errors of their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        )
        raise InputError(f"{path}: cannot be written: {reason}") from error


def load_checkpoint(checkpoint: Path, model: nn.Module) -> dict[str, Any]:
    """Put a checkpoint's weights into `model` and return its state (read with ``weights_only=True``)."""
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{checkpoint}: expected a readable checkpoint of this model, got: {reason}"
        ) from error


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
