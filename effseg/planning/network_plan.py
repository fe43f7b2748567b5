"""What a network of nnU-Net's plans needs as it is and converted, and how large its volumes may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import nn

from effseg.conversion import convert
from effseg.errors import InputError
from effseg.memory.choice import HEADROOM
from effseg.memory.largest import largest
from effseg.memory.predict import peak_training_memory
from effseg.memory.report import OUTSIDE, MemoryReport
from effseg.memory.units import format_bytes
from effseg.planning.nnunet_plans import PlannedNetwork, Size

MODES = (None, "raw", "block", "stream")
Predict = Callable[[Size, int], MemoryReport]
Tell = Callable[[str | None, Size], None]


@dataclass(frozen=True)
class NetworkMode:
    """memory: of MODES, None for the network as it is, "stream" only where it can do that; patch: a step on
    the plan's patches; whole: one on a volume of the median size; largest: the largest patch, in the shape
    and number of the plan's, that fits, or None."""

    memory: str | None
    patch: MemoryReport
    whole: MemoryReport
    largest: Size | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "memory": self.memory,
            "patch_peak": self.patch.peak,
            "patch_reserved": self.patch.reserved,
            "whole_volume_peak": self.whole.peak,
            "whole_volume_reserved": self.whole.reserved,
            "largest_patch": self.largest and list(self.largest),
        }


@dataclass(frozen=True)
class NetworkPlan:
    """The answer; usable: bytes after headroom; batch: patches in a step; whole: the median size, padded to
    what the network takes."""

    network: PlannedNetwork
    batch: int
    whole: Size
    gpu_memory: int
    usable: int
    modes: tuple[NetworkMode, ...]

    @property
    def fits(self) -> bool:
        """Whether the plan's patches do, in any mode."""
        return any(mode.patch.reserved <= self.usable for mode in self.modes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "fits": self.fits,
            "gpu_memory": self.gpu_memory,
            "usable": self.usable,
            "network": self.network.name,
            "configuration": self.network.configuration,
            "classes": self.network.classes,
            "patch": list(self.network.patch),
            "batch": self.batch,
            "whole_volume": list(self.whole),
            "modes": [mode.to_dict() for mode in self.modes],
        }

    def __str__(self) -> str:
        network, report = self.network, self.modes[0].patch
        heads = (
            "",
            f"patch {_text(network.patch)}, batch {self.batch}",
            f"whole {_text(self.whole)}, batch 1",
            f"largest patch, batch {self.batch}",
        )
        return "\n".join((
            f"{network.name}, {network.configuration}: {report.parameters / 1e6:.2f} M parameters, "
            f"channels {network.channels}, classes {network.classes}, {report.dtype}",
            f"Usable: {format_bytes(self.usable)} of {format_bytes(self.gpu_memory)}",
            "",
            *(_row(heads), *map(_row, map(self._cells, self.modes))),
            "",
            OUTSIDE,
        ))  # fmt: skip

    def _cells(self, mode: NetworkMode) -> Sequence[str]:
        needs = (
            f"{format_bytes(report.reserved)}, {'fits' if report.reserved <= self.usable else 'does not fit'}"
            for report in (mode.patch, mode.whole)
        )
        return mode.memory or "as it is", *needs, "none" if mode.largest is None else _text(mode.largest)


def _row(cells: Sequence[str]) -> str:
    name, *others = cells
    return f"{name:<8}" + "".join(f"{cell:>30}" for cell in others)


def plan_network(
    network: PlannedNetwork,
    gpu_memory: int,
    *,
    dtype: str = "bf16",
    batch: int | None = None,
    optimizer: str = "sgd",
    headroom: float = HEADROOM,
    tell: Tell = lambda mode, size: None,
) -> NetworkPlan:
    """Predict a training step on the plan's patches and on a whole volume, as it is and converted.

    batch: patches in a step, the plan's by default; gpu_memory: bytes; headroom: fraction kept free. Every
    size that is said to fit was predicted itself. The loss is Dice + cross-entropy with deep supervision.
    tell: called before every prediction with the mode, one of MODES, and the size that is predicted.
    Raises InputError for amounts that make no sense, and for a network of which nothing can be converted.
    """
    if not 0 <= headroom < 1:
        raise InputError(f"headroom: expected a fraction from 0 to under 1, got {headroom}")
    if gpu_memory <= 0:
        raise InputError(f"gpu memory: expected more than 0 bytes, got {gpu_memory}")
    batch = network.batch if batch is None else batch
    usable = int(gpu_memory * (1 - headroom))
    whole = network.padded(network.median)
    original = network.build()
    modes = []
    for memory in MODES:
        model = _in_mode(original, network, memory)
        if model is None:
            continue
        predict = _prediction(model, network.channels, dtype, optimizer, partial(tell, memory))
        patch = predict(network.patch, batch)
        volume = predict(whole, 1)
        size = _largest(network, predict, patch, volume, usable)
        modes.append(NetworkMode(memory, patch, volume, size))
    return NetworkPlan(network, batch, whole, gpu_memory, usable, tuple(modes))


def _in_mode(original: nn.Module, network: PlannedNetwork, memory: str | None) -> nn.Module | None:
    """None where the network cannot do "stream"."""
    if memory is None:
        return original
    shape = (1, network.channels, *network.patch)
    try:
        return convert(original, memory=memory, shape=shape)
    except InputError:
        if memory != "stream":
            raise
        return None


def _prediction(
    model: nn.Module, channels: int, dtype: str, optimizer: str, tell: Callable[[Size], None]
) -> Predict:
    @cache
    def predict(size: Size, batch: int) -> MemoryReport:
        tell(size)
        shape = (batch, channels, *size)
        return peak_training_memory(model, shape, dtype=dtype, optimizer=optimizer, device="cuda")

    return predict


def _largest(
    network: PlannedNetwork, predict: Predict, known: MemoryReport, other: MemoryReport, usable: int
) -> Size | None:
    """Of patches that grow as a whole, each axis in steps of what the network takes."""
    longest = max(network.patch)

    def scaled(edge: int) -> Size:
        d, h, w = (
            max(1, patch * edge // (longest * multiple)) * multiple
            for patch, multiple in zip(network.patch, network.multiple, strict=True)
        )
        return d, h, w

    edge = largest(lambda size: predict(size, known.shape[0]), known, usable, scaled, other)
    return scaled(edge) if edge else None


def _text(size: Size) -> str:
    return "x".join(map(str, size))
