"""Does a volume fit on a GPU, how, and what is the largest one that does?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from effseg.errors import InputError
from effseg.memory.choice import HEADROOM, Choice, Settings, first_that_fits, predict
from effseg.memory.largest import STEP, Volume, largest
from effseg.memory.predict import peak_training_memory
from effseg.memory.report import MemoryReport
from effseg.models.effsegnet import EffSegNet
from effseg.models.levels import PRESETS
from effseg.models.registry import build_model
from effseg.models.training_step import TrainingStep

__all__ = [
    "BASELINE", "HEADROOM", "MEMORY", "STEP", "Mode", "Plan", "Request", "choose", "plan", "total_gpu_memory",
]  # fmt: skip

BASELINE = "unet3d"
MEMORY = ("auto", "raw", "stream")


@dataclass(frozen=True)
class Request:
    """One kind of training step. volume: (X, Y, Z) in voxels; classes: background included; memory: one of
    MEMORY, for networks that have modes; gpus: that share a volume, of which each has its process; offload:
    whether level 1 may lie in the host's memory."""

    volume: Volume
    classes: int
    model: str = "effseg-base"
    dtype: str = "bf16"
    channels: int = 1
    batch: int = 1
    optimizer: str = "adamw"
    memory: str = "auto"
    gpus: int = 1
    offload: bool = False


@dataclass(frozen=True)
class Mode:
    """A way to run the step. settings: None for a network that has but one way; arithmetic:
    multiply-accumulates relative to mode raw."""

    settings: Settings | None
    slab_elements: int | None
    report: MemoryReport
    arithmetic: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "memory": self.settings and self.settings.memory,
            "recompute_levels": self.settings.recompute_levels if self.settings else 0,
            "offload": self.settings is not None and self.settings.offload,
            "slab_elements": self.slab_elements,
            "peak": self.report.peak,
            "allocated": self.report.allocated,
            "reserved": self.report.reserved,
            "reserved_expandable": self.report.reserved_expandable,
            "sent": self.report.sent,
            "messages": self.report.messages,
            "host": self.report.host,
            "to_host": self.report.to_host,
            "to_device": self.report.to_device,
            "bytes_per_voxel": self.report.bytes_per_voxel,
            "arithmetic": self.arithmetic,
        }


@dataclass(frozen=True)
class Plan:
    """The answer: how the step runs, what it and the baseline need, what fits; usable: bytes after headroom.

    mode: the one with the least arithmetic that fits, or the one that needs least where none does; modes:
    those looked at, the table of all; largest_cube: voxels along an edge; largest_slices: Z of the largest
    volume with the request's X and Y; both in steps of STEP, 0 where not even STEP fits, by whatever mode
    the request allows.
    """

    request: Request
    gpu_memory: int
    usable: int
    mode: Mode
    modes: tuple[Mode, ...]
    baseline: MemoryReport
    largest_cube: int
    largest_slices: int

    @property
    def report(self) -> MemoryReport:
        """The prediction for the chosen mode."""
        return self.mode.report

    @property
    def fits(self) -> bool:
        """Whether what it is predicted to reserve is usable."""
        return self.report.reserved <= self.usable

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "fits": self.fits,
            "gpu_memory": self.gpu_memory,
            "usable": self.usable,
            "mode": self.mode.to_dict(),
            "modes": [mode.to_dict() for mode in self.modes],
            "prediction": self.report.to_dict(),
            "baseline": self.baseline.to_dict(),
            "largest_cube": [self.largest_cube] * 3,
            "largest_slices": [*self.request.volume[:2], self.largest_slices],
        }


def plan(request: Request, gpu_memory: int, headroom: float = HEADROOM) -> Plan:
    """Predict the step in all modes and search for the largest volumes; gpu_memory: bytes; headroom: fraction
    kept free.

    Every size that is said to fit was predicted itself, not extrapolated. Raises InputError for sizes,
    names or amounts that make no sense.
    """
    if not 0 <= headroom < 1:
        raise InputError(f"headroom: expected a fraction from 0 to under 1, got {headroom}")
    if gpu_memory <= 0:
        raise InputError(f"gpu memory: expected more than 0 bytes, got {gpu_memory}")
    if request.memory not in MEMORY:
        raise InputError(f"memory: expected one of {', '.join(MEMORY)}, got {request.memory!r}")
    if request.gpus < 1:
        raise InputError(f"gpus: expected 1 or more, got {request.gpus}")
    if request.gpus > 1 and not request.model.startswith("effseg-"):
        raise InputError(f"gpus: expected 1 for {request.model}, got {request.gpus}")
    if request.volume[0] < request.gpus:
        raise InputError(
            f"gpus: expected {request.volume[0]} or fewer, a row of voxels for each, got {request.gpus}"
        )
    if request.offload:
        _check_offload(request)
    usable = int(gpu_memory * (1 - headroom))
    mode, modes, leanest = _modes(request, usable)
    x, y, _ = request.volume
    search = partial(largest, partial(_predict, request, leanest), mode.report, usable)
    return Plan(
        request=request,
        gpu_memory=gpu_memory,
        usable=usable,
        mode=mode,
        modes=modes,
        baseline=_stock(request, request.volume, BASELINE),
        largest_cube=search(lambda size: (size, size, size)),
        largest_slices=search(lambda size: (x, y, size)),
    )


def _check_offload(request: Request) -> None:
    """Raise InputError where nothing can be offloaded."""
    preset = request.model.removeprefix("effseg-")
    if preset not in PRESETS or PRESETS[preset].stem_stride != 1:
        raise InputError(f"offload: expected an EffSegNet with a full-resolution level, got {request.model}")
    if request.memory == "raw":
        raise InputError("offload: expected memory stream or auto, got raw")
    if request.gpus > 1:
        raise InputError(f"offload: expected 1 GPU for a volume, got {request.gpus}")


def choose(
    name: str,
    in_channels: int,
    num_classes: int,
    shape: Sequence[int],
    dtype: str,
    budget: int,
    optimizer: str = "adamw",
    device: str = "cuda",
    offload: bool = False,
) -> Choice:
    """The settings with the least arithmetic whose predicted reservation is within `budget` bytes.

    name: of an EffSegNet, as in ``effseg-base``; shape: the image's (N, C, D, H, W); dtype: bf16 or fp32;
    device: cpu or cuda, where the step will run; offload: whether level 1 may lie in the host's memory.
    Raises InputError where nothing fits, with what would.
    """
    preset = name.removeprefix("effseg-")
    if preset not in PRESETS:
        known = ", ".join(f"effseg-{preset}" for preset in PRESETS)
        raise InputError(f"model: expected one of {known}, got {name!r}")
    arguments = {"in_channels": in_channels, "num_classes": num_classes, "preset": preset}
    step = TrainingStep.of(EffSegNet, arguments, shape, dtype, optimizer, device)
    return first_that_fits(step, step.candidates(offload=offload), budget)


def total_gpu_memory() -> int:
    """Bytes of this machine's first GPU. Raises InputError without one."""
    if not torch.cuda.is_available():
        raise InputError("gpu memory: no GPU is visible here: say how much one has, as in --gpu-memory 24GB")
    return torch.cuda.get_device_properties(0).total_memory


def _modes(request: Request, usable: int) -> tuple[Mode, tuple[Mode, ...], Settings | None]:
    """The mode to run in, all modes looked at, and the settings that need least of those allowed.

    Thinner slabs are looked at only where nothing else fits.
    """
    step = _step(request, request.volume)
    if step is None:
        only = Mode(None, None, _stock(request, request.volume, request.model), 1.0)
        return only, (only,), None
    allowed = step.candidates(request.memory, request.offload)
    modes: list[Mode] = []
    chosen: Mode | None = None
    for settings in step.candidates(offload=request.offload):
        if settings.rows is not None and (chosen is not None or settings not in allowed):
            continue
        report = predict(step, settings)
        arithmetic = report.macs / predict(step, Settings("raw")).macs
        modes.append(Mode(settings, step.slab_elements(settings), report, arithmetic))
        if chosen is None and settings in allowed and report.reserved <= usable:
            chosen = modes[-1]
    least = min((mode for mode in modes if mode.settings in allowed), key=lambda mode: mode.report.reserved)
    return chosen or least, tuple(modes), allowed[-1]


def _step(request: Request, volume: Volume) -> TrainingStep | None:
    """None for a network without memory modes."""
    if not request.model.startswith("effseg-"):
        return None
    arguments = build_model(request.model, request.channels, request.classes).arguments
    shape = (request.batch, request.channels, *volume)
    return TrainingStep.of(
        EffSegNet, arguments, shape, request.dtype, request.optimizer, "cuda", request.gpus
    )


def _predict(request: Request, settings: Settings | None, volume: Volume) -> MemoryReport:
    """The request's step on another volume."""
    step = _step(request, volume)
    if step is None or settings is None:
        return _stock(request, volume, request.model)
    return predict(step, settings)


@lru_cache(maxsize=256)
def _stock(request: Request, volume: Volume, model: str) -> MemoryReport:
    return peak_training_memory(
        lambda: build_model(model, request.channels, request.classes),
        (request.batch, request.channels, *volume),
        dtype=request.dtype,
        optimizer=request.optimizer,
        augmented=True,
        device="cuda",
    )
