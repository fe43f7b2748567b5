"""nnU-Net's plans file: which network on which patches. nnU-Net itself is not needed to read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from pydoc import locate
from typing import Any

from torch import nn

from effseg.errors import InputError

Size = tuple[int, int, int]


@dataclass(frozen=True)
class PlannedNetwork:
    """One configuration. patch, median: voxels, in the order of the plans' axes; multiple: of what every size
    must be along each axis."""

    configuration: str
    architecture: Mapping[str, Any]
    channels: int
    classes: int
    patch: Size
    batch: int
    median: Size
    multiple: Size

    @property
    def name(self) -> str:
        return str(self.architecture["network_class_name"]).rpartition(".")[2]

    def build(self) -> nn.Module:
        """The network as nnU-Net trains it, with deep supervision. Raises InputError where it cannot be."""
        known = self.architecture.get("_kw_requires_import", ())
        arguments = {
            key: _found(value) if key in known and value is not None else value
            for key, value in self.architecture["arch_kwargs"].items()
        }
        kind = _found(self.architecture["network_class_name"])
        network: nn.Module = kind(
            input_channels=self.channels, num_classes=self.classes, deep_supervision=True, **arguments
        )
        return network

    def padded(self, size: Size) -> Size:
        """The smallest size that the network takes and that holds `size`."""
        d, h, w = (-(-n // m) * m for n, m in zip(size, self.multiple, strict=True))
        return d, h, w


def read_plans(path: Path, configuration: str = "3d_fullres", classes: int | None = None) -> PlannedNetwork:
    """A configuration of a plans file.

    classes: background included; None: those of the dataset.json beside the file, which a cascade needs in
    any case, whose network is shown every label of the stage before as a channel. Raises InputError where
    the file is none of nnU-Net's, has no such configuration or one that is not 3D.
    """
    plans = _read(path)
    known = plans.get("configurations")
    if not isinstance(known, dict) or configuration not in known:
        names = ", ".join(known) if isinstance(known, dict) else "none"
        raise InputError(f"{path}: expected a configuration {configuration!r}, the file has {names}")
    entries = _inherited(known, configuration)
    try:
        architecture = entries["architecture"]
        strides = architecture["arch_kwargs"]["strides"]
        return PlannedNetwork(
            configuration=configuration,
            architecture=architecture,
            channels=len(plans["foreground_intensity_properties_per_channel"])
            + (0 if entries.get("previous_stage") is None else _foreground(path.parent / "dataset.json")),
            classes=classes or _classes(path.parent / "dataset.json"),
            patch=_size(entries["patch_size"]),
            batch=int(entries["batch_size"]),
            median=_size(entries["median_image_size_in_voxels"]),
            multiple=_size(prod(steps) for steps in zip(*strides, strict=True)),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: configuration {configuration!r} is not 3D, or lacks {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected nnU-Net's plans, found no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected nnU-Net's plans, a JSON object, got {type(found).__name__}")
    return found


def _inherited(known: dict[str, Any], name: str) -> dict[str, Any]:
    """A configuration may name another one whose entries it takes over."""
    entries, seen = dict(known[name]), {name}
    while (parent := entries.pop("inherits_from", None)) is not None:
        if parent in seen or parent not in known:
            raise InputError(f"configuration {name!r}: expected to inherit from another, got {parent!r}")
        seen.add(parent)
        entries = {**known[parent], **entries}
    return entries


def _classes(path: Path) -> int:
    """Outputs of the network: one per label, or one per region, which have no background."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; --classes says how many there are, background included")
    labels = _labels(path)
    has_regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values())
    return len(labels) - has_regions


def _foreground(path: Path) -> int:
    """Labels above 0, those that regions are made of each once."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, of whose labels a cascade's network has a channel each")
    labels = _labels(path).values()
    return len({int(v) for value in labels for v in (value if isinstance(value, list) else [value])} - {0})


def _labels(path: Path) -> dict[str, Any]:
    return {k: v for k, v in _read(path)["labels"].items() if k != "ignore"}


def _size(values: Any) -> Size:
    d, h, w = (round(value) for value in values)
    return d, h, w


def _found(name: str) -> Any:
    found = locate(name)
    if found is None:
        package = name.partition(".")[0].replace("_", "-")
        raise InputError(f"{name}: not found; is {package} installed?")
    return found
