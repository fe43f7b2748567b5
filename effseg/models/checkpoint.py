"""Checkpoints: one safetensors file, the constructor's arguments and extras as JSON in its metadata."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from effseg.common.atomic import atomic_path
from effseg.errors import InputError
from effseg.models.base import SegmentationModel

FORMAT = 1
KEY = "effseg"

# Class names that a file may ask for, and where they are. A file can name nothing else.
CLASSES = {
    "EffSegNet": "effseg.models.effsegnet",
    "StockEffSegNet": "effseg.models.stock",
    "UNet3D": "effseg.models.unet3d",
}


def save(model: SegmentationModel, path: str | os.PathLike[str]) -> None:
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


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> SegmentationModel:
    """Read a checkpoint that a model's `save` wrote; the network comes back in evaluation mode.

    Only numbers and JSON are read from the file, nothing in it is executed. Raises InputError, naming the
    file, for anything that is not a whole checkpoint of this package, FileNotFoundError where none is.
    """
    path = Path(path)
    header, weights = _read(path)
    model = _build(path, header)
    _check_weights(path, model.state_dict(), weights)
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(weights)
    model.extra = header["extra"]
    return model.to(device).eval()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
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


def _build(path: Path, header: dict[str, Any]) -> SegmentationModel:
    name, arguments, extra = header.get("class"), header.get("arguments"), header.get("extra")
    if not isinstance(name, str) or name not in CLASSES:
        raise InputError(f"{path}: expected a network of {', '.join(CLASSES)}, got {name!r}")
    if not isinstance(arguments, dict) or not isinstance(extra, dict):
        raise InputError(f"{path}: expected tables of arguments and extras in the metadata")
    network = getattr(importlib.import_module(CLASSES[name]), name)
    try:
        model = network(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot build {name}: {' '.join(str(error).split())}") from None
    if not isinstance(model, SegmentationModel):
        raise TypeError(f"{name} is no SegmentationModel")
    return model


def _check_weights(path: Path, expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    odd = sorted(expected.keys() ^ got.keys())
    if odd:
        state = "lacks" if odd[0] in expected else "holds an unknown"
        raise InputError(f"{path}: {state} {odd[0]!r} ({len(odd)} of {len(expected)} tensors differ)")
    for key, tensor in expected.items():
        shape, found = tuple(tensor.shape), tuple(got[key].shape)
        if shape != found:
            raise InputError(f"{path}: {key!r}: expected shape {shape}, got {found}")
