"""Checkpoints: one safetensors file, the constructor's arguments and extras as JSON in its metadata."""

import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch

from effseg.common.atomic import atomic_path
from effseg.errors import InputError

FORMAT = 1
KEY = "effseg"


class Saved(Protocol):
    """What is written of a network: its constructor's arguments, extras and weights."""

    arguments: dict[str, Any]
    extra: dict[str, Any]

    def state_dict(self) -> dict[str, torch.Tensor]: ...


def save(model: Saved, path: str | os.PathLike[str]) -> None:
    """Write `model`'s weights, class, arguments and extra to `path`, atomically."""
    from safetensors.torch import save_file

    header = {
        "format": FORMAT,
        "class": type(model).__name__,
        "arguments": model.arguments,
        "extra": model.extra,
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"extra: expected JSON values only: {error}") from None
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(weights, temporary, metadata={KEY: text})


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `save` noted down, and the weights. Raises InputError, naming the file, for another file."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # a missing file, a folder, one without permission: the system's own words
        pass
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise InputError(f"{path}: a safetensors file, but not a checkpoint of effseg")
            header = json.loads(text)
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable checkpoint: {' '.join(str(error).split())}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise InputError(f"{path}: expected checkpoint format {FORMAT}, got {found!r}")
    return header, weights
