"""The networks by name, and those that a checkpoint holds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from effseg.errors import InputError
from effseg.models.base import SegmentationModel
from effseg.models.checkpoint import read
from effseg.models.effsegnet import EffSegNet
from effseg.models.levels import PRESETS
from effseg.models.stock import StockEffSegNet
from effseg.models.unet3d import UNet3D

__all__ = ["MODEL_NAMES", "build_model", "load", "register"]

Factory = Callable[[int, int], SegmentationModel]

_FACTORIES: dict[str, Factory] = {
    **{f"effseg-{preset}": partial(EffSegNet, preset=preset) for preset in PRESETS},
    "unet3d": UNet3D,
}
MODEL_NAMES = tuple(_FACTORIES)
CLASSES: dict[str, type[SegmentationModel]] = {c.__name__: c for c in (EffSegNet, StockEffSegNet, UNet3D)}
"""Those that a file may ask for, with the registered ones: it can name nothing else."""


def build_model(name: str, in_channels: int, num_classes: int) -> SegmentationModel:
    """A new network; name: one of MODEL_NAMES; num_classes: background included. Raises InputError."""
    if name not in _FACTORIES:
        raise InputError(f"model: expected one of {', '.join(MODEL_NAMES)}, got {name!r}")
    return _FACTORIES[name](in_channels, num_classes)


def register(name: str, make: Factory, kind: type[SegmentationModel]) -> None:
    """Let this process know another network: `build_model`, so training, by `name`, `load` by its class.

    make: (in_channels, num_classes) -> network; kind: its class, whose constructor takes the keywords that
    the network keeps as `arguments`. Registered again, a name stands for the newer network.
    Raises InputError where name or class is one of this package's.
    """
    if name in MODEL_NAMES:
        raise InputError(f"name: expected none of {', '.join(MODEL_NAMES)}, got {name!r}")
    if CLASSES.get(kind.__name__, kind) is not kind:
        raise InputError(f"kind: expected a class of another name than {', '.join(CLASSES)}, got {kind}")
    _FACTORIES[name] = make
    CLASSES[kind.__name__] = kind


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> SegmentationModel:
    """Read a checkpoint that a model's `save` wrote; the network comes back in evaluation mode.

    Only numbers and JSON are read from the file, nothing in it is executed. Raises InputError, naming the
    file, for anything that is not a whole checkpoint of this package, or holds weights or running statistics
    that are not finite, FileNotFoundError where none is.
    """
    path = Path(path)
    header, weights = read(path)
    model = _build(path, header)
    _check_weights(path, model.state_dict(), weights)
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(weights)
    _check_finite(path, model)
    model.extra = header["extra"]
    return model.to(device).eval()


def _build(path: Path, header: dict[str, Any]) -> SegmentationModel:
    name, arguments, extra = header.get("class"), header.get("arguments"), header.get("extra")
    if not isinstance(name, str) or name not in CLASSES:
        raise InputError(f"{path}: expected a network of {', '.join(CLASSES)}, got {name!r}")
    if not isinstance(arguments, dict) or not isinstance(extra, dict):
        raise InputError(f"{path}: expected tables of arguments and extras in the metadata")
    try:
        return CLASSES[name](**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot build {name}: {' '.join(str(error).split())}") from None


def _check_finite(path: Path, model: SegmentationModel) -> None:
    statistics = ((key, value) for key, value in model.named_buffers() if "running_" in key)
    for key, tensor in itertools.chain(model.named_parameters(), statistics):
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {key!r}: expected finite numbers")


def _check_weights(path: Path, expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    odd = sorted(expected.keys() ^ got.keys())
    if odd:
        state = "lacks" if odd[0] in expected else "holds an unknown"
        raise InputError(f"{path}: {state} {odd[0]!r} ({len(odd)} of {len(expected)} tensors differ)")
    for key, tensor in expected.items():
        shape, found = tuple(tensor.shape), tuple(got[key].shape)
        if shape != found:
            raise InputError(f"{path}: {key!r}: expected shape {shape}, got {found}")
