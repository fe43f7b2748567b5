"""Everything that a training run depends on, in one frozen value that JSON can hold."""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from effseg.data.intensities import Scaling, Window, parse_window
from effseg.errors import InputError

# What may differ between a run and its continuation: nothing here changes a computed number,
FREE_ON_RESUME = frozenset(
    {"data", "output", "workers", "device", "cache", "checkpoint_interval", "allow_missing", "split_volume"}
)

# or it is compared as what it comes to: classes, pairs of them, weights to begin with, cases a step.
COMPARED_ELSEWHERE = frozenset({"labels", "mirror_pairs", "init", "batch_size"})


@dataclass(frozen=True)
class TrainingConfig:
    """One training run.

    data: folder of CT volumes with labels (nnU-Net's layout or flat ``NAME_ct``/``NAME_seg`` pairs).
    init: weights to begin with, a .safetensors file or a run's folder; a head of another number of classes is
        made anew. None: random ones.
    output: the run's folder; made when absent, continued when it holds a run of the same configuration.
    model: a name of `effseg.models.MODEL_NAMES`.
    norm: "instance", "batch" or "group" for effseg models (the 3D U-Net always has batch norm).
    memory: "raw", "stream" or "auto" for effseg models, see `EffSegNet`; auto is raw on a CPU without budget.
    memory_budget: for "auto", such as "24GB"; None: the GPU's. recompute: levels, for raw and stream.
    offload: whether the level of half resolution is kept in the host's memory; with auto, whether it may be.
    labels: which labels to learn: a group of labels.json, ``GROUP:organ,organ`` or ``organ,organ``.
    cases: which cases to use, e.g. ``"case001-case016,case020"``; None: all labelled ones.
    validation: which cases validate, in the same language; they are looked for among all labelled cases
        and never train. Not together with `fold`.
    fold: number of the fold of splits_final.json, else of nnU-Net's five-fold split, that validates; "all"
        trains on every case, without validation. None with no `validation` means fold 0.
    allow_missing: go on without the cases of which files are missing or unreadable, instead of raising.
    steps: optimiser steps. epochs: passes over the training cases, used instead of `steps` when given.
    batch_size: volumes (or patches) per process and step; above 1 their sizes must agree.
    split_volume: processes that share a volume (`effseg.parallel`), for effseg models on whole volumes; a
        batch is then theirs together.
    learning_rate: peak rate of AdamW; None: 4e-3 for effseg models, 1e-3 for the 3D U-Net.
    class_weights: cross-entropy weights: "sqrt" for 1/sqrt(class frequency), or "none".
    dice_weight, ce_weight, label_smoothing, include_background, batch_dice: the loss's options.
    dtype: "bf16" (autocast), "fp32", or "auto": bf16 on CUDA, fp32 on a CPU.
    ema: decay per step of a running mean of the weights which then is validated and saved; 0: none.
    augment: random affine maps, intensities and noise for the training cases.
    augment_strength: of their ranges, above 0 and 4 at most: 2 turns, zooms and shifts twice as far, and
        changes intensities twice as much (`effseg.data.augmentation`); patches are not shifted.
    augment_on: where that runs: "cpu", in the threads that prepare batches, "device", where the network is,
        or "auto": device on CUDA, else cpu. Their noise differs.
    mirror: "left-right" mirrors every second training volume, too, and needs to be told in mirror_pairs, or
        in the data's description, which labels then change places: see `effseg.data.mirroring.mirror_pairs`.
    patch_size: train on random patches of that many voxels (R, A, S axes) instead of whole volumes and
        validate by a sliding window; None: whole volumes.
    window: HU limits of the intensity window of all CT channels (those that dataset.json calls otherwise are
        scaled as nnU-Net does), or for each channel what `effseg.data.preprocessing.Preprocessing` takes.
        spacing: voxel size in mm (R, A, S) to resample to; None: every scan's own. crop: "body" or "none".
        margin: mm kept around the body.
    validation_interval, checkpoint_interval: in steps.
    seed: with the step number it determines every random choice.
    workers: background threads that prepare batches; 0 prepares them between steps.
    device: "auto" (CUDA where there is a GPU), "cpu", "cuda" or "cuda:N".
    cache: folder for prepared volumes, 3 bytes a voxel, which several runs may share; None: in `output`.

    Raises InputError, naming the field, for a value out of range.
    """

    data: Path
    output: Path
    model: str = "effseg-base"
    init: Path | None = None
    norm: Literal["instance", "batch", "group"] = "instance"
    memory: Literal["raw", "stream", "auto"] = "auto"
    memory_budget: str | None = None
    recompute: int = 0
    offload: bool = False
    labels: str | None = None
    cases: str | None = None
    validation: str | None = None
    fold: int | Literal["all"] | None = None
    allow_missing: bool = False
    steps: int = 2000
    epochs: int | None = None
    batch_size: int = 1
    split_volume: int = 1
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    warmup: float = 0.08
    clip_norm: float = 5.0
    class_weights: Literal["sqrt", "none"] = "sqrt"
    dice_weight: float = 1.0
    ce_weight: float = 1.0
    label_smoothing: float = 0.0
    include_background: bool = False
    batch_dice: bool = False
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    ema: float = 0.0
    augment: bool = True
    augment_strength: float = 1.0
    augment_on: Literal["auto", "cpu", "device"] = "auto"
    mirror: Literal["none", "left-right"] = "none"
    mirror_pairs: str | None = None
    patch_size: tuple[int, int, int] | None = None
    window: Window | tuple[Scaling, ...] = (-200.0, 400.0)
    spacing: tuple[float, float, float] | None = None
    crop: Literal["body", "none"] = "body"
    margin: float = 5.0
    validation_interval: int = 100
    checkpoint_interval: int = 100
    seed: int = 0
    workers: int = 1
    device: str = "auto"
    cache: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", Path(self.data))
        object.__setattr__(self, "output", Path(self.output))
        for name in ("cache", "init"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        for name, kind in (("patch_size", int), ("spacing", float)):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(map(kind, value)))
        object.__setattr__(self, "window", parse_window(self.window))
        self._check()

    def _check(self) -> None:
        for name in ("steps", "batch_size", "split_volume", "validation_interval", "checkpoint_interval"):
            _demand(self, name, getattr(self, name) >= 1, "at least 1")
        _demand(self, "epochs", self.epochs is None or self.epochs >= 1, "at least 1")
        _demand(self, "workers", self.workers >= 0, "0 or more")
        _demand(self, "seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1")
        rate = self.learning_rate
        _demand(self, "learning_rate", rate is None or 0 < rate < math.inf, "above 0")
        _demand(self, "clip_norm", self.clip_norm > 0, "above 0")
        for name in ("weight_decay", "dice_weight", "ce_weight", "margin"):
            _demand(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        _demand(self, "ce_weight", self.dice_weight + self.ce_weight > 0, "above 0 when dice_weight is 0")
        for name in ("warmup", "label_smoothing", "ema"):
            _demand(self, name, 0 <= getattr(self, name) < 1, "0 or more and below 1")
        _demand(self, "augment_strength", 0 < self.augment_strength <= 4, "above 0 and at most 4")
        whole = self.augment or self.augment_strength == 1
        _demand(self, "augment_strength", whole, "none without augmentation")
        for name, values in _CHOICES.items():
            _demand(self, name, getattr(self, name) in values, f"one of {', '.join(values)}")
        _demand(self, "mirror", self.mirror == "none" or self.augment, "none without augmentation")
        good = self.mirror_pairs is None or self.mirror == "left-right"
        _demand(self, "mirror_pairs", good, "none without mirror left-right")
        baseline = not self.model.startswith("effseg")
        _demand(self, "norm", self.norm == "instance" or not baseline, "a choice for effseg models only")
        chosen = self.memory != "auto" or self.recompute or self.memory_budget is not None
        _demand(self, "memory", not (baseline and chosen), "a choice for effseg models only")
        level = (
            not baseline and self.model != "effseg-tiny" and self.memory != "raw" and self.split_volume == 1
        )
        good = not self.offload or level
        _demand(
            self, "offload", good, "False but for memory stream or auto, an effseg model but tiny, no split"
        )
        _demand(self, "recompute", not self.offload or self.recompute != 1, "0, or 2 and more, with offload")
        inside = self.init is not None and self.output.absolute() in (self.init / "x").absolute().parents
        _demand(self, "init", not inside, f"weights outside of the output {self.output}")
        whole = self.split_volume == 1 or not (baseline or self.patch_size)
        _demand(self, "split_volume", whole, "1 but for effseg models on whole volumes")
        on_cpu = self.split_volume == 1 or self.augment_on != "device"
        _demand(self, "augment_on", on_cpu, "auto or cpu where processes share a volume")
        _demand(self, "recompute", self.recompute >= 0, "0 or more levels")
        _demand(self, "recompute", self.memory != "auto" or not self.recompute, "0, auto chooses it")
        alone = self.memory == "auto" or self.memory_budget is None
        _demand(self, "memory_budget", alone, "one with memory auto only")
        fold, patch, spacing = self.fold, self.patch_size, self.spacing
        good = fold is None or fold == "all" or (isinstance(fold, int) and fold >= 0)
        _demand(self, "fold", good, "0, 1, ... or 'all'")
        good = fold is None or self.validation is None
        _demand(self, "fold", good, "none beside validation cases")
        good = patch is None or (len(patch) == 3 and min(patch) >= 1)
        _demand(self, "patch_size", good, "3 sizes in voxels")
        good = spacing is None or (len(spacing) == 3 and 0 < min(spacing) <= max(spacing) < math.inf)
        _demand(self, "spacing", good, "3 sizes in mm above 0")

    @property
    def peak_rate(self) -> float:
        """The learning rate at the top of the schedule."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 4e-3 if self.model.startswith("effseg") else 1e-3

    def augments_on(self, device: torch.device) -> bool:
        """Whether cases are augmented on `device`, where the network is, and not ahead on the CPU, as those
        are of which a process takes a part."""
        chosen = self.augment_on == "auto" and device.type != "cpu" and self.split_volume == 1
        on_device = self.augment_on == "device" or chosen
        return self.augment and on_device

    @property
    def validates(self) -> bool:
        """Whether a part of the cases validates."""
        return self.fold != "all"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: paths as strings, tuples as lists."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingConfig":
        """The inverse of `to_dict`. Raises InputError for a field that is unknown or missing."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise InputError(f"training configuration: unknown field {name!r}")
        for name in ("data", "output"):
            if name not in values:
                raise InputError(f"training configuration: field {name!r} is missing")
        return cls(**values)

    def replace(self, **changes: Any) -> "TrainingConfig":
        """The same but for these fields. Raises InputError as the constructor does."""
        return replace(self, **changes)

    def check_continues(self, earlier: "TrainingConfig") -> None:
        """Raise InputError naming the first field in which this configuration departs from `earlier`."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(earlier, field.name)
            if field.name not in FREE_ON_RESUME | COMPARED_ELSEWHERE and mine != theirs:
                raise InputError(
                    f"{self.output} holds a run with {field.name} = {theirs}, but now it is {mine}: "
                    "use another output folder, or overwrite the run"
                )


_CHOICES = {
    "norm": ("instance", "batch", "group"),
    "memory": ("raw", "stream", "auto"),
    "class_weights": ("sqrt", "none"),
    "dtype": ("auto", "bf16", "fp32"),
    "augment_on": ("auto", "cpu", "device"),
    "crop": ("body", "none"),
    "mirror": ("none", "left-right"),
}


def _demand(config: TrainingConfig, name: str, good: bool, expected: str) -> None:
    if not good:
        raise InputError(f"{name}: expected {expected}, got {getattr(config, name)}")
