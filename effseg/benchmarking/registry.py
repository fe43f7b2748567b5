"""Every contender and every workload of the benchmarks, and which of them each suite runs.

A contender is a network with a way to compute it. All are used alike: `make`, then `batch`, then `step` or
`infer` as often as one likes.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effseg import EffSegNet, UNet3D, algorithm
from effseg.algorithms import ALGORITHMS
from effseg.benchmarking import checkpointing, networks
from effseg.benchmarking.checkpointing import CheckpointedUNet3D
from effseg.benchmarking.networks import DNA, MONAI
from effseg.conversion import convert
from effseg.errors import InputError
from effseg.losses import dice_cross_entropy
from effseg.memory.step import label_dtype_for, training_loss
from effseg.models.base import SegmentationModel
from effseg.models.levels import PRESETS
from effseg.models.stock import StockEffSegNet

DTYPES = ("bf16", "fp32")
"""Of a step: under autocast, or without."""
COMPILED = ("compile", "budget")
IMPLEMENTATIONS = ("eager", "channels_last", "checkpoint", *COMPILED)
"""Of a network in stock torch; one of this package is computed by an algorithm, or by the one it chooses."""
MEMORY_BUDGET = 0.5
"""Of "budget": the part of what torch.compile would keep for backward that it may keep."""
NO_GPU = "kernels need a CUDA GPU"
ONLY_FULL = "only with --full"
ONLY_COMPILED = "only with --compiled"


@dataclass(frozen=True)
class Workload:
    """One image (1, 1, D, H, W) of `volume`, and labels of so many classes, background included."""

    volume: tuple[int, int, int]
    classes: int = 15

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.volume))}, {self.classes} classes"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (1, 1, *self.volume)

    @property
    def voxels(self) -> int:
        return math.prod(self.volume)


@dataclass(frozen=True)
class Contender:
    """network: its name; implementation: one of IMPLEMENTATIONS, an algorithm of this package, or "auto";
    memory: an EffSegNet's mode, "stream+1" with level 1 recomputed, a converted network's, "-" of others;
    make: builds it for so many classes and one channel; requires: modules; is_ours: whether it is what this
    package is about."""

    network: str
    implementation: str
    memory: str
    make: Callable[[int], nn.Module]
    requires: tuple[str, ...] = ()
    is_ours: bool = False

    @property
    def name(self) -> str:
        parts = (self.network, self.memory, self.implementation)
        return "/".join(part for part in parts if part != "-")

    def batch(
        self, model: nn.Module, workload: Workload, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """A random float32 image and labels in the type that the network's loss reads."""
        random = torch.Generator(device).manual_seed(seed)
        image = torch.randn(workload.shape, generator=random, device=device)
        size, dtype = (1, *workload.volume), label_dtype_for(model, None)
        labels = torch.randint(workload.classes, size, generator=random, device=device, dtype=dtype)
        return image, labels

    def step(self, model: nn.Module, image: Tensor, labels: Tensor, dtype: str) -> Tensor:
        """Forward, loss and backward; gradients are added to those that are there. The loss, detached."""
        low = dtype == "bf16"
        with self.active():
            with torch.autocast(image.device.type, torch.bfloat16, enabled=low):
                loss = training_loss(model, self._laid_out(image), labels, self.loss, {})
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def infer(self, model: nn.Module, image: Tensor) -> Tensor:
        """The most probable class of every voxel, (1, D, H, W); follows autocast if that is on."""
        with self.active():
            if isinstance(model, SegmentationModel):
                return model.segment(self._laid_out(image))
            return model(self._laid_out(image)).argmax(1).to(torch.uint8)

    @property
    def loss(self) -> Callable[..., Tensor] | None:
        """Dice + cross-entropy, compiled where the network is; None: the network's own, else as it is."""
        return _compiled_loss() if self.implementation in COMPILED else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """What must hold while the network runs: the forced algorithm, the compiler's settings."""
        with ExitStack() as stack:
            if self.implementation in (*ALGORITHMS, "auto"):
                stack.enter_context(algorithm(self.implementation))
            if self.implementation == "budget":
                import torch._functorch.config as compiler

                stack.enter_context(compiler.patch(activation_memory_budget=MEMORY_BUDGET))
            yield

    def _laid_out(self, image: Tensor) -> Tensor:
        if self.implementation != "channels_last":
            return image
        return image.contiguous(memory_format=torch.channels_last_3d)


def missing(contender: Contender, device: torch.device | str | None = None) -> str | None:
    """Why the contender cannot run, on that device if one is named; None if it can."""
    for module in contender.requires:
        package = module.split(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if device is not None and contender.implementation == "triton" and torch.device(device).type != "cuda":
        return NO_GPU
    return None


@cache
def _compiled_loss() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(dice_cross_entropy)
    return compiled


@cache
def workloads() -> dict[str, Workload]:
    """By name, smallest first."""
    edges = [(64, 64, 64), (96, 96, 96), (128, 128, 128), *((512, 512, z) for z in (128, 256, 512))]
    found = [Workload(edge) for edge in edges] + [Workload((512, 512, 128), classes=105)]
    return {workload.name: workload for workload in found}


@cache
def contenders() -> dict[str, Contender]:
    """By name: the baselines, the same architecture as ours in stock torch, ours, converted baselines."""
    found = [*_baselines(), *_ours(), *_converted()]
    return {contender.name: contender for contender in found}


_BASELINES: tuple[tuple[str, Any, Any, tuple[str, ...]], ...] = (
    ("unet3d", partial(UNet3D, 1), partial(CheckpointedUNet3D, 1), ()),
    ("nnunet", networks.plain_conv_unet, checkpointing.plain_conv_unet, (DNA,)),
    ("nnunet-resenc-m", networks.residual_encoder_unet, checkpointing.residual_encoder_unet, (DNA,)),
    ("segresnet", networks.segresnet, checkpointing.segresnet, (MONAI,)),
    ("dynunet", networks.dynunet, checkpointing.dynunet, (MONAI,)),
    ("basic-unet", networks.basic_unet, checkpointing.basic_unet, (MONAI,)),
)
"""Name, how it is made, with activation checkpointing, and what it needs."""

CONVERTED = ("raw", "block", "stream")
"""Memory modes of converted networks."""


def _baselines() -> Iterator[Contender]:
    for name, make, checkpointed, requires in _BASELINES:
        for implementation in IMPLEMENTATIONS:
            build = checkpointed if implementation == "checkpoint" else make
            yield Contender(name, implementation, "-", _made(build, implementation), requires)
    for preset in PRESETS:
        build = partial(StockEffSegNet, 1, preset=preset)
        for implementation in ("eager", "channels_last", "compile"):
            yield Contender(f"stock-effseg-{preset}", implementation, "-", _made(build, implementation))


def _made(build: Callable[[int], nn.Module], implementation: str) -> Callable[[int], nn.Module]:
    """`build`, followed by what the implementation does to a whole network."""

    def make(classes: int) -> nn.Module:
        network = build(classes)
        if implementation == "channels_last":
            network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        elif implementation in COMPILED:
            network.compile()
        return network

    return make


def _ours() -> Iterator[Contender]:
    for preset, architecture in PRESETS.items():
        streams = architecture.stem_stride == 1  # else both modes are the same
        for memory in ("raw", "stream", "stream+1") if streams else ("raw",):
            mode, _, recompute = memory.partition("+")
            build = partial(EffSegNet, 1, preset=preset, memory=mode, recompute=int(recompute or 0))
            for implementation in (*ALGORITHMS, "auto"):
                requires = ("triton",) if implementation == "triton" else ()
                yield Contender(f"effseg-{preset}", implementation, memory, build, requires, is_ours=True)


def _converted() -> Iterator[Contender]:
    for name, make, _, requires in _BASELINES:
        for memory in CONVERTED:
            for implementation in (*ALGORITHMS, "auto"):
                needs = (*requires, "triton") if implementation == "triton" else requires
                build = partial(_convert, make, memory)
                yield Contender(name, implementation, memory, build, needs, is_ours=True)


def _convert(make: Callable[[int], nn.Module], memory: str, classes: int) -> nn.Module:
    return convert(make(classes), memory=memory, leave_alone=False)


class Case(NamedTuple):
    contender: Contender
    workload: Workload


@dataclass(frozen=True)
class Selection:
    """Names of contenders and of workloads, each with each."""

    contenders: tuple[str, ...]
    workloads: tuple[str, ...]


_SHORT = (
    "unet3d/eager", "unet3d/checkpoint", "nnunet/eager", "nnunet/checkpoint", "segresnet/eager",
    *(f"nnunet/{memory}/auto" for memory in CONVERTED),
    "stock-effseg-base/eager", "effseg-base/raw/auto", "effseg-base/stream/auto", "effseg-base/stream+1/auto",
)  # fmt: skip
_LONG = (
    *_SHORT[:4], "unet3d/channels_last", "unet3d/compile", "unet3d/budget",
    "nnunet/channels_last", "nnunet/compile", "nnunet/budget", "nnunet-resenc-m/eager",
    "nnunet-resenc-m/checkpoint", "nnunet-resenc-m/compile", "segresnet/eager", "segresnet/checkpoint",
    "segresnet/compile", "dynunet/eager", "dynunet/checkpoint", "basic-unet/eager", "basic-unet/checkpoint",
    *(f"stock-effseg-base/{how}" for how in ("eager", "channels_last", "compile")),
    *(f"stock-effseg-{preset}/eager" for preset in PRESETS if preset != "base"),
    *(f"effseg-base/{memory}/{how}" for memory in ("raw", "stream") for how in (*ALGORITHMS, "auto")),
    *(f"effseg-base/stream+1/{how}" for how in (*ALGORITHMS, "auto")),
    *(f"effseg-{preset}/{memory}/auto" for preset in ("large", "large-w32") for memory in ("raw", "stream")),
    "effseg-tiny/raw/auto",
    *(f"{name}/{memory}/auto" for name, *_ in _BASELINES for memory in CONVERTED),
    "nnunet/raw/aten", "nnunet/raw/triton",
)  # fmt: skip
_WHOLE = tuple(f"512x512x{slices}, 15 classes" for slices in (128, 256, 512))

SELECTIONS: dict[str, tuple[Selection, Selection]] = {
    "memory": (Selection(_SHORT, _WHOLE[:1]), Selection(_LONG, _WHOLE)),
    "throughput": (
        Selection(_SHORT, ("96x96x96, 15 classes",)),
        Selection(_LONG, ("128x128x128, 15 classes", *_WHOLE, "512x512x128, 105 classes")),
    ),
}
"""Of each suite: what runs by default, and what `full` runs."""


def select(suite: str, full: bool = False, compiled: bool = False) -> list[Case]:
    """What a suite runs, those included that `missing` will name; compiled: also those that torch.compile
    makes. Raises InputError for an unknown suite."""
    if suite not in SELECTIONS:
        raise InputError(f"suite: expected one of {', '.join(SELECTIONS)}, got {suite!r}")
    selection = SELECTIONS[suite][full]
    return [
        Case(contenders()[contender], workloads()[workload])
        for workload in selection.workloads
        for contender in selection.contenders
        if compiled or contenders()[contender].implementation not in COMPILED
    ]
