"""Does a volume fit on a GPU, and what is the largest one that does?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effseg.errors import InputError
from effseg.memory.predict import peak_training_memory
from effseg.memory.report import MemoryReport
from effseg.models import build_model

BASELINE = "unet3d"
STEP = 8  # voxels: how finely the largest sizes are told

# Convolution workspace, rounding and fragmentation and the CUDA context are outside a prediction, so this
# part of the memory is left to them.
HEADROOM = 0.1


@dataclass(frozen=True)
class Request:
    """One kind of training step. volume: (X, Y, Z) in voxels; classes: background included."""

    volume: tuple[int, int, int]
    classes: int
    model: str = "effseg-base"
    dtype: str = "bf16"
    channels: int = 1
    batch: int = 1
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Plan:
    """The answer: what the step needs, what the baseline needs, what fits; usable: bytes after headroom.

    largest_cube: voxels along an edge; largest_slices: Z of the largest volume with the request's X and Y;
    both in steps of STEP, 0 where not even STEP fits.
    """

    request: Request
    gpu_memory: int
    usable: int
    report: MemoryReport
    baseline: MemoryReport
    largest_cube: int
    largest_slices: int

    @property
    def fits(self) -> bool:
        return self.report.peak <= self.usable

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "fits": self.fits,
            "gpu_memory": self.gpu_memory,
            "usable": self.usable,
            "prediction": self.report.to_dict(),
            "baseline": self.baseline.to_dict(),
            "largest_cube": [self.largest_cube] * 3,
            "largest_slices": [*self.request.volume[:2], self.largest_slices],
        }


def plan(request: Request, gpu_memory: int, headroom: float = HEADROOM) -> Plan:
    """Predict the step and search for the largest volumes; gpu_memory: bytes; headroom: fraction kept free.

    Every size that is said to fit was predicted itself, not extrapolated. Raises InputError for sizes,
    names or amounts that make no sense.
    """
    if not 0 <= headroom < 1:
        raise InputError(f"headroom: expected a fraction from 0 to under 1, got {headroom}")
    if gpu_memory <= 0:
        raise InputError(f"gpu memory: expected more than 0 bytes, got {gpu_memory}")
    usable = int(gpu_memory * (1 - headroom))
    report = predict(request, request.volume)
    x, y, _ = request.volume
    return Plan(
        request=request,
        gpu_memory=gpu_memory,
        usable=usable,
        report=report,
        baseline=report if request.model == BASELINE else predict(request, request.volume, BASELINE),
        largest_cube=_largest(request, report, usable, lambda size: (size, size, size)),
        largest_slices=_largest(request, report, usable, lambda size: (x, y, size)),
    )


def predict(request: Request, volume: Sequence[int], model: str | None = None) -> MemoryReport:
    """The request's step on another volume, or with another network."""
    name = model or request.model
    return peak_training_memory(
        lambda: build_model(name, request.channels, request.classes),
        (request.batch, request.channels, *volume),
        dtype=request.dtype,
        optimizer=request.optimizer,
    )


def total_gpu_memory() -> int:
    """Bytes of this machine's first GPU. Raises InputError without one."""
    if not torch.cuda.is_available():
        raise InputError("gpu memory: no GPU is visible here: say how much one has, as in --gpu-memory 24GB")
    return torch.cuda.get_device_properties(0).total_memory


def _largest(
    request: Request, known: MemoryReport, usable: int, volume: Callable[[int], tuple[int, int, int]]
) -> int:
    """The largest multiple of STEP whose volume fits.

    A peak is a fixed part plus bytes per voxel that hardly change with the size, so a guess is nearly
    right at once; it moves until a size fits and the next larger one is expected not to.
    """
    fixed = known.split["parameters"] + known.split["optimizer"]
    per_voxel = (known.peak - fixed) / known.voxels
    fitting, too_large = 0, None
    while True:
        size = _last(lambda s: fixed + per_voxel * _voxels(request, volume(s)) <= usable)  # noqa: B023
        size = size if too_large is None else min(size, too_large - STEP)
        if size <= fitting:
            return fitting
        try:
            report = predict(request, volume(size))
        except InputError:  # the request itself was fine, so this volume is too small for the network
            return fitting
        per_voxel = (report.peak - fixed) / report.voxels
        if report.peak <= usable:
            fitting = size
        else:
            too_large = size


def _last(fits: Callable[[int], bool]) -> int:
    """The last multiple of STEP that fits, where all before it do."""
    low, high = 0, 1
    while fits(high * STEP):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP


def _voxels(request: Request, volume: tuple[int, int, int]) -> int:
    return request.batch * volume[0] * volume[1] * volume[2]
