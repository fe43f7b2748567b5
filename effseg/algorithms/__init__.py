"""The seam between operators and the ways to compute them.

An operator (`effseg.operators`) decides what is saved for backward, walks over slabs and knows no arithmetic;
an algorithm (`effseg.algorithms.interface`) is a module of
operations on slabs. `select` names the one to use.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch

from effseg.common.formats import DTYPES, dtype_name
from effseg.common.settings import Setting

if TYPE_CHECKING:
    from effseg.algorithms.interface import Algorithm

ALGORITHMS = ("aten", "triton")
TRITON_DTYPES = tuple(DTYPES.values())
_forced = Setting("effseg_algorithm", "auto")


@contextmanager
def algorithm(name: str) -> Iterator[None]:
    """Force one algorithm inside a `with` block: "aten" (cuDNN or oneDNN), "triton" (our kernels), or "auto"
    to let effseg choose.

    An operator keeps the algorithm of its forward for its backward. Raises `ValueError` for an unknown name;
    operators raise it where "triton" is forced on what it does not take (float64).
    """
    if name not in ("auto", *ALGORITHMS):
        raise ValueError(f"algorithm: expected one of auto, {', '.join(ALGORITHMS)}, got {name!r}")
    with _forced.set(name):
        yield


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the forced algorithm, or of the one for this device and compute type: kernels on a GPU for
    which they have been measured (`effseg tune`), else ATen."""
    name = _forced.get()
    if name == "triton" and dtype not in TRITON_DTYPES:
        known = ", ".join(map(dtype_name, TRITON_DTYPES))
        raise ValueError(f"algorithm: triton computes in {known}, got {dtype_name(dtype)}")
    if name == "auto":
        wanted = device.type == "cuda" and dtype in TRITON_DTYPES and _measured(device)
        name = "triton" if wanted else "aten"
    return name


@torch.compiler.assume_constant_result
def _measured(device: torch.device) -> bool:
    """Whether a tuned file says what our kernels and ATen's take on this GPU; without one nobody knows."""
    from effseg.kernels.device import gpu
    from effseg.kernels.tuned import read_tuned, tuned_files

    return any(read_tuned(path) for path in tuned_files(gpu(device)))


def load(name: str) -> Algorithm:
    """The algorithm called `name`, imported when first used."""
    return cast("Algorithm", importlib.import_module(f"effseg.algorithms.{name}.ops"))


def select(device: torch.device, dtype: torch.dtype) -> Algorithm:
    """The algorithm that `choose` names."""
    return load(choose(device, dtype))
