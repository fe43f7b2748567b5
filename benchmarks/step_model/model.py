"""The time of a step, on paper: of all that it starts the largest of what holds it, and gaps between."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from benchmarks.step_model import work
from benchmarks.step_model.compiled import Code, code_of
from benchmarks.step_model.devices import Assumptions, Device
from benchmarks.step_model.recording import Operator, Step, distinct
from effseg.kernels.config import blocks
from effseg.kernels.launch import Launch

COPIES = ("copy_", "clone", "_to_copy", "cat")
"""Which move values and change nothing but their type and order: for each other as a program is written."""
EPILOGUES = ("", " statistics", " epilogue")


@dataclass(frozen=True)
class Cost:
    """Seconds of a launch, by what may hold it."""

    bytes: float
    issue: float = 0.0
    tensor: float = 0.0

    @property
    def floor(self) -> float:
        """Below which no kernel of this work can be: issue is what kernels can be better at."""
        return max(self.bytes, self.tensor)

    @property
    def seconds(self) -> float:
        return max(self.bytes, self.issue, self.tensor)


@dataclass
class Kernel:
    """All launches of a step that share a name. seconds: with gaps; floor: what bytes and tensor cores alone
    would take, without gaps; bytes, issue, tensor, gaps: seconds of each by itself."""

    name: str
    launches: int = 0
    seconds: float = 0.0
    floor: float = 0.0
    gaps: float = 0.0
    bytes: float = 0.0
    issue: float = 0.0
    tensor: float = 0.0

    def add(self, cost: Cost, count: int, gap: float) -> None:
        self.launches += count
        self.gaps += count * gap
        self.seconds += count * (cost.seconds + gap)
        self.floor += count * cost.floor
        self.bytes += count * cost.bytes
        self.issue += count * cost.issue
        self.tensor += count * cost.tensor

    @property
    def limit(self) -> str:
        """What holds it: the largest of the four."""
        return max(("bytes", "issue", "tensor", "gaps"), key=lambda what: float(getattr(self, what)))


@dataclass(frozen=True)
class Modelled:
    """A step on a device. kernels: the longest first; host: seconds that the host takes to start all."""

    kernels: tuple[Kernel, ...]
    host: float

    @property
    def device(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        return max(self.device, self.host)

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)


def modelled(
    step: Step,
    device: Device,
    folder: Path,
    assumed: Assumptions,
    show: Callable[[str], object] = lambda _: None,
) -> Modelled:
    """folder: where compiled kernels' figures are kept."""
    found: dict[str, Kernel] = {}
    for name, cost, count in costs(step, device, folder, assumed, show):
        found.setdefault(name, Kernel(name)).add(cost, count, assumed.gap)
    launching = sum(kernel.launches for kernel in found.values())
    host = launching * assumed.host + step.views * assumed.host_view
    return Modelled(tuple(sorted(found.values(), key=lambda kernel: -kernel.seconds)), host)


def costs(
    step: Step, device: Device, folder: Path, assumed: Assumptions, show: Callable[[str], object]
) -> Iterator[tuple[str, Cost, int]]:
    """(name, cost of one, how many) of everything that a step starts."""
    known: dict[Hashable, tuple[str, Cost]] = {}
    for launch, count in step.launches:
        if min(launch.grid) == 0:
            continue
        key = signature(launch)
        if key not in known:
            known[key] = (
                name_of(launch),
                cost_of(launch, code_of(launch, device.architecture, folder, show), device),
            )
        yield *known[key], count
    for operator, count in step.operators.items():
        yield operator_name(operator), cost_of_operator(operator, device, assumed), count


def signature(launch: Launch) -> Hashable:
    """What two launches of the same cost have in common."""
    tensors = [arg for arg in launch.args if isinstance(arg, Tensor)]
    return (
        name_of(launch),
        launch.grid,
        tuple((t.shape, t.stride(), t.dtype, t.storage_offset() % 16) for t in tensors),
        len(distinct(tensors)),
        tuple(arg for arg in launch.args if not isinstance(arg, Tensor)),
        str(sorted(launch.options.items())),
    )


def cost_of(launch: Launch, code: Code, device: Device) -> Cost:
    issue, tensor = work.clocks(launch, code, device)
    return Cost(work.moved(launch) / device.bandwidth, issue / device.clock, tensor / device.clock)


def cost_of_operator(operator: Operator, device: Device, assumed: Assumptions) -> Cost:
    """Products with their channels padded, at the assumed share of the tensor rate; all else moves bytes."""
    pad = 1.0
    for channels in operator.channels:
        if channels:
            pad *= blocks(channels, assumed.library_channels) * assumed.library_channels / channels
    tensor = operator.flops * pad / (device.flops * assumed.library_share)
    return Cost(operator.bytes / device.bandwidth, tensor=tensor)


def operator_name(operator: Operator) -> str:
    if operator.name.startswith("convolution"):
        return f"cuDNN {operator.name} {operator.channels[0]}->{operator.channels[1]}"
    return "aten copies" if operator.name in COPIES else f"aten {operator.name}"


def name_of(launch: Launch) -> str:
    """The kernel, its channels and what it fuses: what a profile would tell apart by specialisation."""
    given = launch.options
    kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    if "CHANNEL_BLOCKS" in given:
        taps = given.get("TAPS", (3, 3, 3))
        strided = math.prod(given.get("STEP", (1,))) > 1 or math.prod(given.get("SPREAD", (1,))) > 1
        epilogue = EPILOGUES[work.epilogue_of(given)]
        return (
            f"{kernel} {given['C']}->{given['CHANNELS']} {'x'.join(map(str, taps))}"
            + (" strided" if strided else "") + (" prologue" if given["PROLOGUE"] else "") + epilogue
        )  # fmt: skip
    if "FOLD" in given:
        loop = given.get("LOOP", "tap")
        taps = "3x3x3" if loop != "tap" else "x".join(str(given[f"K{axis}"]) for axis in "DHW")
        return (
            f"wgrad {loop} {given['CI']}->{given['CO']} {taps}"
            + (" strided" if given.get("STRIDE_W", 1) > 1 else "")
            + (" prologue" if given["PROLOGUE"] else "") + (" fold" if given["FOLD"] else "")
        )  # fmt: skip
    return f"{kernel} {given['C']}"


def break_even(
    step: Step, seconds: float, device: Device, folder: Path, assumed: Assumptions
) -> float | None:
    """The library_share with which a step would take so many seconds on the GPU; None if none would."""
    low, high = 0.01, 1.0

    def excess(share: float) -> float:
        return modelled(step, device, folder, replace(assumed, library_share=share)).device - seconds

    if excess(low) < 0 or excess(high) > 0:
        return None
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return round(high, 3)
