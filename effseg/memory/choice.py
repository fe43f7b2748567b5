"""Which memory mode, recomputation and slabs a training step takes, for a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import nn

from effseg.errors import InputError
from effseg.memory.largest import largest
from effseg.memory.predict import peak_training_memory
from effseg.memory.report import MemoryReport
from effseg.memory.units import format_bytes, parse_bytes

# The CUDA context and whatever else is on a GPU are outside a prediction, and its workspace of convolutions
# is a guess, so this part of the memory is left to them.
HEADROOM = 0.1


@dataclass(frozen=True)
class Settings:
    """memory: raw or stream; recompute_levels: levels from half resolution down that run again in
    backward; rows: of a slab at the network's finest level, None: as a sweep would choose; offload: the raw
    outputs of the level of half resolution are in the host's memory."""

    memory: str
    recompute_levels: int = 0
    rows: int | None = None
    offload: bool = False

    def __str__(self) -> str:
        parts = [self.memory] + ["level 1 offloaded"] * self.offload
        if self.recompute_levels and self.offload:
            below = "level 2" if self.recompute_levels == 2 else f"levels 2-{self.recompute_levels}"
            parts.append(f"{below} recomputed")
        elif self.recompute_levels:
            parts.append("level 1" if self.recompute_levels == 1 else f"levels 1-{self.recompute_levels}")
            parts[-1] += " recomputed"
        if self.rows:
            parts.append(f"slabs of {self.rows} row{'s' * (self.rows > 1)}")
        return ", ".join(parts)


class Step(Protocol):
    """One kind of training step of a network with settings, hashable. shape: the image's, (N, C, D, H, W);
    dtype: bf16 or fp32; device: where it runs, cpu or cuda; processes: that share the volume; image_dtype,
    label_dtype: as the batch lies there."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def processes(self) -> int: ...
    @property
    def image_dtype(self) -> torch.dtype: ...
    @property
    def label_dtype(self) -> torch.dtype: ...

    def __hash__(self) -> int: ...

    def build(self, settings: Settings) -> nn.Module:
        """The network with these settings."""

    def slab_elements(self, settings: Settings) -> int | None:
        """Of a slab; None: as a sweep would choose."""

    def at(self, volume: tuple[int, ...]) -> Step:
        """The same step on another volume."""


@lru_cache(maxsize=4096)
def predict(step: Step, settings: Settings) -> MemoryReport:
    """The step with these settings; takes seconds at any size, and no time when asked again."""
    with torch.enable_grad():
        return peak_training_memory(
            lambda: step.build(settings), step.shape, dtype=step.dtype, optimizer=step.optimizer,
            device=step.device, augmented=step.device == "cuda", processes=step.processes,
            image_dtype=step.image_dtype, label_dtype=step.label_dtype,
        )  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """Settings that were looked at, and their predicted bytes: the peak of tensors, and what is reserved for
    them, which decides."""

    settings: Settings
    peak: int
    reserved: int


@dataclass(frozen=True)
class Choice:
    """settings: memory mode, levels recomputed, rows of a slab; slab_elements: of a slab, None for as a sweep
    would choose; peak, reserved: predicted bytes of tensors, and of what the allocator takes; arithmetic:
    multiply-accumulates of a step relative to raw's; candidates: what was looked at, in order, the chosen one
    last."""

    settings: Settings
    slab_elements: int | None
    peak: int
    reserved: int
    arithmetic: float
    candidates: tuple[Candidate, ...]

    @property
    def memory(self) -> str:
        """The mode, raw or stream."""
        return self.settings.memory

    @property
    def recompute_levels(self) -> int:
        """Levels, from half resolution down, that run again in backward."""
        return self.settings.recompute_levels


def first_that_fits(step: Step, candidates: Sequence[Settings], budget: int) -> Choice:
    """The first of these whose predicted peak is within `budget` bytes. Raises InputError where none is."""
    looked_at: list[Candidate] = []
    for settings in candidates:
        report = predict(step, settings)
        looked_at.append(Candidate(settings, report.peak, report.reserved))
        if report.reserved <= budget:
            return Choice(
                settings=settings,
                slab_elements=step.slab_elements(settings),
                peak=report.peak,
                reserved=report.reserved,
                arithmetic=report.macs / predict(step, Settings("raw")).macs,
                candidates=tuple(looked_at),
            )
    raise InputError(_nothing_fits(step, min(looked_at, key=lambda c: c.reserved), budget))


def usable(budget: int | str | None, device: torch.device) -> int:
    """A budget in bytes; None: what the GPU has, less HEADROOM. Raises InputError on a CPU without one."""
    if isinstance(budget, str):
        return parse_bytes(budget)
    if budget is not None:
        return budget
    if device.type != "cuda":
        raise InputError(f"memory_budget: memory='auto' on {device.type} needs one, as in '24GB'; got none")
    return int(torch.cuda.get_device_properties(device).total_memory * (1 - HEADROOM))


def _nothing_fits(step: Step, least: Candidate, budget: int) -> str:
    x, y, _ = step.shape[2:]
    settings = least.settings
    known = predict(step, settings)
    slices = largest(
        lambda volume: predict(step.at(volume), settings),
        known,
        budget,
        lambda size: (x, y, size),
    )
    fitting = f"the largest volume that fits is {x}x{y}x{slices}" if slices else f"no {x}x{y} volume fits"
    return (
        f"memory: training {known.model} on {'x'.join(map(str, step.shape))} in {step.dtype} needs "
        f"{format_bytes(least.reserved)} or more ({settings}), "
        f"the budget is {format_bytes(budget)}; {fitting}"
    )
