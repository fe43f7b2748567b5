"""Which memory mode, recomputation and slabs a training step takes, for a budget of bytes."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from effseg.errors import InputError
from effseg.memory.largest import largest
from effseg.memory.predict import check_step, peak_training_memory
from effseg.memory.report import MemoryReport
from effseg.memory.units import format_bytes, parse_bytes
from effseg.models.effsegnet import EffSegNet
from effseg.models.levels import PRESETS
from effseg.slabs import SHARE, THICK_SLAB_ELEMENTS, THICKEST_SLAB_ELEMENTS, rows_per_slab

# The CUDA context and whatever else is on a GPU are outside a prediction, and its workspace of convolutions
# is a guess, so this part of the memory is left to them.
HEADROOM = 0.1

RECOMPUTE_LEVELS = (1, 2)  # a block of level 3 would save half a byte per voxel
THIN_SLABS = (4, 2, 1)  # rows
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}


@dataclass(frozen=True)
class Settings:
    """memory: raw or stream; recompute_levels: levels from half resolution down that run again in
    backward; rows: of a slab at the network's finest level, None: as a sweep would choose."""

    memory: str
    recompute_levels: int = 0
    rows: int | None = None

    def __str__(self) -> str:
        parts = [self.memory]
        if self.recompute_levels:
            parts.append("level 1" if self.recompute_levels == 1 else f"levels 1-{self.recompute_levels}")
            parts[-1] += " recomputed"
        if self.rows:
            parts.append(f"slabs of {self.rows} row{'s' * (self.rows > 1)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Step:
    """One kind of training step of an EffSegNet. arguments: its constructor's, as JSON; shape: the image's,
    (N, C, D, H, W); device: where it runs, cpu or cuda. Raises InputError for what no step has."""

    arguments: str
    shape: tuple[int, ...]
    dtype: str = "bf16"
    optimizer: str = "adamw"
    device: str = "cuda"

    def __post_init__(self) -> None:
        check_step(self.shape, self.dtype, self.device)

    @classmethod
    def of(cls, arguments: dict[str, Any], shape: Sequence[int], *rest: str) -> "Step":
        """Without what a choice decides."""
        kept = {k: v for k, v in arguments.items() if k not in ("memory", "memory_budget", "recompute")}
        return cls(json.dumps(kept, sort_keys=True), tuple(shape), *rest)

    @property
    def preset(self) -> str:
        return str(json.loads(self.arguments).get("preset", "base"))

    def slab_elements(self, settings: Settings) -> int | None:
        return None if settings.rows is None else settings.rows * self._finest()[1]

    def candidates(self, memory: str = "auto") -> list[Settings]:
        """What can be chosen with this `memory`, least arithmetic first."""
        streams = PRESETS[self.preset].stem_stride == 1
        lean = "stream" if streams else "raw"
        most = RECOMPUTE_LEVELS[-1]
        on_gpu, device = self.device == "cuda", torch.device(self.device)
        most_elements = THICKEST_SLAB_ELEMENTS if on_gpu else THICK_SLAB_ELEMENTS["cpu"]
        usual = rows_per_slab(*self._finest(), SHARE, device)
        thick = rows_per_slab(*self._finest(), most_elements, device)
        found = [Settings("raw", 0, thick)] * (on_gpu and thick > usual) + [Settings("raw")]
        if streams:
            found += [Settings(lean, 0, thick)] * (thick > usual) + [Settings(lean)]
        found += [Settings(lean, levels) for levels in RECOMPUTE_LEVELS]
        found += [Settings(lean, most, rows) for rows in THIN_SLABS if rows < usual]
        if memory == "raw":
            return [
                settings for settings in found if settings.memory == "raw" and not settings.recompute_levels
            ]
        return [s for s in found if s.memory == "stream"] if memory == "stream" and streams else found

    def _finest(self) -> tuple[int, int]:
        """Rows, and elements of a row, at the network's finest level."""
        architecture = PRESETS[self.preset]
        d, h, w = (-(-size // architecture.stem_stride) for size in self.shape[2:])
        return d, architecture.widths[0] * h * w


@lru_cache(maxsize=4096)
def predict(step: Step, settings: Settings) -> MemoryReport:
    """The step with these settings; takes seconds at any size, and no time when asked again."""

    def build() -> EffSegNet:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever made the real network has been warned
            model = EffSegNet(**json.loads(step.arguments), memory=settings.memory)
        model.recompute_levels = settings.recompute_levels
        model.slab_elements = step.slab_elements(settings)
        return model

    with torch.enable_grad():
        return peak_training_memory(
            build, step.shape, dtype=step.dtype, optimizer=step.optimizer, device=step.device,
            augmented=step.device == "cuda",
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


def choose(
    name: str,
    in_channels: int,
    num_classes: int,
    shape: Sequence[int],
    dtype: str,
    budget: int,
    optimizer: str = "adamw",
    device: str = "cuda",
) -> Choice:
    """The settings with the least arithmetic whose predicted reservation is within `budget` bytes.

    name: of an EffSegNet, as in ``effseg-base``; shape: the image's (N, C, D, H, W); dtype: bf16 or fp32;
    device: cpu or cuda, where the step will run. Raises InputError where nothing fits, with what would.
    """
    preset = name.removeprefix("effseg-")
    if preset not in PRESETS:
        known = ", ".join(f"effseg-{preset}" for preset in PRESETS)
        raise InputError(f"model: expected one of {known}, got {name!r}")
    arguments = {"in_channels": in_channels, "num_classes": num_classes, "preset": preset}
    return choose_for(Step.of(arguments, shape, dtype, optimizer, device), budget)


def choose_for(step: Step, budget: int) -> Choice:
    """`choose` for any network and step."""
    return first_that_fits(step, step.candidates(), budget)


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


def configure(
    model: EffSegNet,
    image_shape: Sequence[int],
    dtype: torch.dtype,
    budget: int | str | None,
    device: torch.device | None = None,
) -> Choice:
    """Set `active_memory`, `recompute_levels` and `slab_elements` of a network for a training step.

    dtype: the compute type; budget: bytes, or a text such as ``24GB``; None: what the GPU of `device` (by
    default that of the weights) has, less HEADROOM. The optimizer is taken to be AdamW, which needs most.
    Raises InputError where nothing fits, and on a CPU without a budget.
    """
    device = device or model.head.weight.device
    if dtype not in _DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise InputError(f"memory: auto knows {known}, got {str(dtype).removeprefix('torch.')}")
    kind = "cpu" if device.type == "cpu" else "cuda"
    step = Step.of(model.arguments, image_shape, _DTYPES[dtype], "adamw", kind)
    choice = choose_for(step, usable(budget, device))
    model.active_memory = choice.memory
    model.recompute_levels = choice.recompute_levels
    model.slab_elements = choice.slab_elements
    return choice


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
    n, c, x, y, _ = step.shape
    settings = least.settings
    known = predict(step, settings)
    slices = largest(
        lambda volume: predict(replace(step, shape=(n, c, *volume)), settings),
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
