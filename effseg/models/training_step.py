"""A training step of an EffSegNet, as the planner sees it: the settings it can run with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from effseg.expressions.slabs import SHARE, THICK_SLAB_ELEMENTS, THICKEST_SLAB_ELEMENTS, rows_per_slab
from effseg.memory.choice import Settings
from effseg.memory.predict import check_step
from effseg.models.levels import PRESETS

RECOMPUTE_LEVELS = (1, 2)  # a block of level 3 would save half a byte per voxel
THIN_SLABS = (4, 2, 1)  # rows
CHOSEN = ("memory", "memory_budget", "recompute", "offload")
"""Arguments that a choice decides."""


@dataclass(frozen=True)
class TrainingStep:
    """An `effseg.memory.choice.Step`. network: EffSegNet, or a class of its constructor; arguments: the
    constructor's, as JSON. Raises InputError for what no step has."""

    network: Callable[..., Any]
    arguments: str
    shape: tuple[int, ...]
    dtype: str = "bf16"
    optimizer: str = "adamw"
    device: str = "cuda"
    processes: int = 1
    image_dtype: torch.dtype = torch.float32
    label_dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        check_step(self.shape, self.dtype, self.device)

    @classmethod
    def of(
        cls, network: Callable[..., Any], arguments: dict[str, Any], shape: Sequence[int], *rest: Any
    ) -> TrainingStep:
        """Without what a choice decides."""
        kept = {k: v for k, v in arguments.items() if k not in CHOSEN}
        return cls(network, json.dumps(kept, sort_keys=True), tuple(shape), *rest)

    def at(self, volume: tuple[int, ...]) -> TrainingStep:
        return replace(self, shape=(*self.shape[:2], *volume))

    def build(self, settings: Settings) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever made the real network has been warned
            model = self.network(**json.loads(self.arguments), memory=settings.memory)
        model.use(settings, self.slab_elements(settings))
        assert isinstance(model, nn.Module)
        return model

    @property
    def preset(self) -> str:
        return str(json.loads(self.arguments).get("preset", "base"))

    def slab_elements(self, settings: Settings) -> int | None:
        return None if settings.rows is None else settings.rows * self._finest()[1]

    def candidates(self, memory: str = "auto", offload: bool = False) -> list[Settings]:
        """What can be chosen with this `memory`, least arithmetic first; offload: with what offloads, too."""
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
        offloads = offload and streams and self.processes == 1
        found += [Settings(lean, offload=True)] * offloads
        found += [Settings(lean, levels) for levels in RECOMPUTE_LEVELS]
        found += [Settings(lean, most, offload=True)] * offloads
        found += [Settings(lean, most, rows, offloads) for rows in THIN_SLABS if rows < usual]
        if memory == "raw":
            return [
                settings for settings in found if settings.memory == "raw" and not settings.recompute_levels
            ]
        return [s for s in found if s.memory == "stream"] if memory == "stream" and streams else found

    def _finest(self) -> tuple[int, int]:
        """Rows that a process holds, and elements of a row, at the network's finest level."""
        architecture = PRESETS[self.preset]
        d, h, w = (-(-size // architecture.stem_stride) for size in self.shape[2:])
        return -(-d // self.processes), architecture.widths[0] * h * w
