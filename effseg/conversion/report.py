"""What `effseg.convert` took over, what it left, and what that saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from effseg.memory.predict import peak_training_memory

STATE = ("parameters", "optimizer", "batch")


class StepBytes(NamedTuple):
    """Bytes of a training step without autocast, per voxel of the image, but for parameters, their state and
    the batch. kept: live once the loss is known; peak: the most that are."""

    kept: float
    peak: float


def step_bytes(network: nn.Module, shape: tuple[int, ...]) -> StepBytes:
    """Of one step on fake tensors."""
    dtype = next(network.parameters()).dtype
    report = peak_training_memory(network, shape, dtype="fp32", image_dtype=dtype)
    state = sum(report.split[kind] for kind in STATE)
    return StepBytes((report.after_forward - state) / report.voxels, (report.peak - state) / report.voxels)


@dataclass(frozen=True)
class ModuleReport:
    """One module's own operators, not those of its children.

    name: as in `named_modules`; kind: its class; taken: what was taken over; left: what was not, and why.
    """

    name: str
    kind: str
    taken: tuple[str, ...]
    left: tuple[str, ...]


@dataclass(frozen=True)
class ConversionReport:
    """modules: those with operators that were taken over or left, in the order of the forward pass; shape:
    of the image it was found out on; problem: why it could not be found out, if so; lasts: names of the
    weights of convolutions that the loss makes in "stream", None where it was not found out.

    `before` and `after` run a training step of the original and of the converted network (in its memory mode,
    "raw" for "auto") on fake tensors of that shape when they are first asked for, which takes some seconds
    and no memory. They raise what the networks raise there.
    """

    model: str
    modules: tuple[ModuleReport, ...]
    shape: tuple[int, ...] | None
    problem: str | None = None
    lasts: tuple[str, ...] | None = None
    steps: Callable[[], tuple[StepBytes, StepBytes]] | None = field(default=None, repr=False, compare=False)

    @property
    def taken(self) -> tuple[ModuleReport, ...]:
        """Modules of which a normalisation was taken over, without which no memory is saved."""
        return tuple(m for m in self.modules if any("normalisation" in what for what in m.taken))

    @property
    def left(self) -> tuple[ModuleReport, ...]:
        """Modules with operators that were left to torch."""
        return tuple(m for m in self.modules if m.left)

    @property
    def before(self) -> StepBytes:
        """What a step of the original network needs."""
        return self._measured()[0]

    @property
    def after(self) -> StepBytes:
        """What a step of the converted network needs."""
        return self._measured()[1]

    @property
    def bytes_saved(self) -> float:
        """Bytes that are no longer kept for backward, per voxel of the image."""
        return self.before.kept - self.after.kept

    @property
    def peak_saved(self) -> float:
        """Bytes by which the peak of a step is lower, per voxel of the image."""
        return self.before.peak - self.after.peak

    def _measured(self) -> tuple[StepBytes, StepBytes]:
        if self.steps is None:
            raise ValueError(f"report: expected that of a converted network, got {self.model}'s alone")
        return self.steps()

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.model}: could not be examined: {self.problem}"
        lines = [f"{self.model} on {'x'.join(map(str, self.shape or ()))}{self._figures()}"]
        for module in self.modules:
            name = module.name or "the network itself"
            taken = f"taken: {', '.join(module.taken)}" if module.taken else ""
            left = f"left: {'; '.join(module.left)}" if module.left else ""
            lines.append(f"  {name} ({module.kind}): {'; '.join(filter(None, (taken, left)))}")
        if self.lasts is not None:
            lines.append(f"  made by the loss: {', '.join(self.lasts) or 'no convolution'}")
        return "\n".join(lines)

    def _figures(self) -> str:
        if self.steps is None:
            return ""
        try:
            before, after = self.steps()
        except Exception as error:  # a network may refuse a step in any way
            return f": a step could not be measured: {one_line(error)}"
        worth = "" if after.peak < before.peak else ": conversion saves nothing here, train the original"
        return (
            f": a step keeps {after.kept:.0f} of {before.kept:.0f} bytes per voxel for backward and "
            f"peaks at {after.peak:.0f} of {before.peak:.0f}{worth}"
        )


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
