"""nnU-Net's checkpoints, read without executing anything in them."""

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effseg.errors import DamagedFile, InputError

NUMBERS = "?bhilBHILefd"  # numpy's codes of what nnU-Net logs


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """mirror_axes: spatial axes, 0 the first, along which the network may be shown mirrored windows."""

    weights: dict[str, Tensor]
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """What prediction needs of a `checkpoint_*.pth` that nnU-Net v2 has written.

    A .pth file is a pickle, which may name any function and have it called. Here it is taken apart by torch's
    restricted reader: tensors, containers, and of numpy nothing but numbers and arrays of them. Weights are
    read from disk when they are used; the optimizer's state is not read.
    Raises InputError for a file that holds anything else or is no nnU-Net checkpoint, DamagedFile for one
    that cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(_numbers()):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: refused: {_reason(error)}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedFile(f"{path}: damaged, or no checkpoint of nnU-Net: {reason}") from None
    return _checked(path, found)


def _checked(path: Path, found: Any) -> Checkpoint:
    try:
        weights, trainer = dict(found["network_weights"]), found["trainer_name"]
        configuration, axes = found["init_args"]["configuration"], found["inference_allowed_mirroring_axes"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{path}: expected a checkpoint of nnU-Net v2 with network_weights, trainer_name, init_args and "
            f"inference_allowed_mirroring_axes, got one without {error}"
        ) from None
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise InputError(f"{path}: network_weights: expected tensors only")
    return Checkpoint(weights, str(trainer), str(configuration), tuple(int(axis) for axis in axes or ()))


def _numbers() -> list[Any]:
    """Functions and types with which numpy writes numbers, under the names of numpy 1 and 2."""
    kinds = [np.dtype(code) for code in NUMBERS]
    named = [
        (value.__reduce__()[0], f"{package}.multiarray.{name}")
        for value, name in ((np.float64(0), "scalar"), (np.zeros(1), "_reconstruct"))
        for package in ("numpy.core", "numpy._core")
    ]
    return [np.dtype, np.ndarray, *{type(kind) for kind in kinds}, *{kind.type for kind in kinds}, *named]


def _reason(error: Exception) -> str:
    """Of torch's paragraph the name that was refused."""
    text = " ".join(str(error).split())
    for mark in ("Unsupported global: GLOBAL ", "Trying to call reduce for unrecognized function ",
                 "Trying to load unsupported GLOBAL ", "Can only build Tensor", "Unsupported operand",
                 "Can only create new object for"):  # fmt: skip
        _, found, rest = text.partition(mark)
        if found:
            name = rest.split()[0] if rest else ""
            return f"it names {name}, which is none of the weights and numbers that nnU-Net writes"
    return f"it holds more than weights and numbers ({text[:160]})"
