"""What `memory="auto"` takes on cards of several sizes, for the table of the page on planning.

`python -m benchmarks.predictions` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effseg.benchmarking import results
from effseg.benchmarking.registry import Workload
from effseg.benchmarking.tabulation import Table
from effseg.common.atomic import atomic_path
from effseg.errors import InputError
from effseg.memory.choice import Settings
from effseg.memory.units import format_bytes
from effseg.planning import choose

SCHEMA = 1
FILE = "auto.json"
MODEL, DTYPE = "effseg-base", "bf16"
WORKLOADS = tuple(Workload((512, 512, slices)) for slices in (128, 256, 512, 1024))
BUDGETS = (8, 12, 16, 24, 80)
"""In 10^9 bytes."""


@dataclass(frozen=True)
class Cell:
    """budget: in 10^9 bytes; volume: as in 512x512x128; settings: those chosen, with the predicted peak of
    tensors and what is reserved for them in bytes, and the arithmetic relative to raw's; None where nothing
    fits: `otherwise` says what would."""

    budget: int
    volume: str
    settings: Settings | None = None
    peak: int | None = None
    arithmetic: float | None = None
    otherwise: str = ""
    reserved: int | None = None

    def __str__(self) -> str:
        if self.settings is None or self.peak is None:
            return self.otherwise.replace("the largest volume that fits is", "up to")
        levels = f" + {self.settings.recompute_levels}" if self.settings.recompute_levels else ""
        rows = f", {self.settings.rows} rows" if self.settings.rows else ""
        needed = format_bytes(self.reserved or self.peak)
        return f"{self.settings.memory}{levels}{rows}: {needed}, {self.arithmetic:.2f}x"


def predicted(budget: int, workload: Workload) -> Cell:
    volume = "x".join(map(str, workload.volume))
    try:
        choice = choose(MODEL, 1, workload.classes, workload.shape, DTYPE, budget * 10**9)
    except InputError as error:
        return Cell(budget, volume, otherwise=str(error).rsplit("; ", 1)[1])
    arithmetic = round(choice.arithmetic, 4)
    return Cell(budget, volume, choice.settings, choice.peak, arithmetic, reserved=choice.reserved)


def write(cells: Sequence[Cell], path: str | os.PathLike[str]) -> None:
    data = {"schema": SCHEMA, "model": MODEL, "dtype": DTYPE, "cells": [asdict(cell) for cell in cells]}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> list[Cell]:
    """Raises InputError for a file that `write` has not made."""
    data = results.parsed(path)
    try:
        if data["schema"] != SCHEMA:
            raise InputError(f"{path}: expected schema {SCHEMA}, got {data['schema']!r}")
        return [_cell(dict(cell)) for cell in data["cells"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected choices of memory='auto', got {error!r}") from None


def _cell(data: dict[str, Any]) -> Cell:
    settings = data.pop("settings")
    return Cell(**data, settings=settings and Settings(**settings))


def table(cells: Sequence[Cell]) -> Table:
    """A row for each budget, a column for each volume."""
    budgets, volumes = (dict.fromkeys(getattr(cell, name) for cell in cells) for name in ("budget", "volume"))
    texts = {(cell.budget, cell.volume): str(cell) for cell in cells}
    return Table(
        "What memory='auto' takes: bytes reserved as predicted, arithmetic relative to raw's",
        ("budget", *volumes),
        tuple(
            (f"{budget} GB", *(texts.get((budget, volume), "not predicted") for volume in volumes))
            for budget in budgets
        ),
    )
