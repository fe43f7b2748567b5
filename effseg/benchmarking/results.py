"""The committed results, and how people call what was compared: shared by the tables and the pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from effseg.benchmarking.record import Record, Row, validate
from effseg.errors import InputError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
NETWORKS = {
    "unet3d": "3D U-Net (Cicek 2016)",
    "nnunet": "nnU-Net PlainConvUNet",
    "nnunet-resenc-m": "nnU-Net ResEnc M",
    "segresnet": "MONAI SegResNet",
    "dynunet": "MONAI DynUNet",
    "basic-unet": "MONAI BasicUNet",
}
WAYS = {
    "eager": "",
    "auto": "",
    "checkpoint": "checkpointed",
    "channels_last": "channels last",
    "compile": "torch.compile",
    "budget": "torch.compile with a memory budget",
    "aten": "ATen",
    "triton": "Triton",
    "stream+1": "stream, level 1 recomputed",
}
COLOURS = {
    "unet3d": "tab:red",
    "nnunet": "tab:orange",
    "nnunet-resenc-m": "darkgoldenrod",
    "segresnet": "tab:brown",
    "dynunet": "tab:pink",
    "basic-unet": "tab:olive",
    "raw": "tab:blue",
    "stream": "tab:green",
    "stream+1": "darkcyan",
}
OTHERS = "tab:purple"
"""Colour of stock torch's twins of ours."""


def records(folder: str | os.PathLike[str] = FOLDER) -> dict[str, Record]:
    """Every benchmark record among a folder's JSON files, by the file's name without suffix, in its order.

    Raises InputError for a bad one.
    """
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        data = parsed(path)
        if isinstance(data, dict) and "rows" in data:
            try:
                found[path.stem] = validate(data)
            except InputError as error:
                raise InputError(f"{path}: expected a benchmark record, got {error}") from None
    return found


def parsed(path: Path) -> Any:
    """Raises InputError, which names the file, for one that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected JSON, got {error}") from None


def rows(records: Iterable[Record], suite: str, **wanted: str) -> Iterator[tuple[Record, Row]]:
    """The suite's rows whose fields have these values, each with its record."""
    for record in records:
        for row in record.rows:
            if row.suite == suite and all(getattr(row, name) == value for name, value in wanted.items()):
                yield record, row


def label(contender: str) -> str:
    """What people call a contender: "stock-effseg-base/eager" is "EffSegNet base, stock torch"."""
    network, *rest = contender.split("/")
    ways = [WAYS.get(way, way) for way in rest]
    if is_converted(contender):
        ways.insert(0, "converted")
    if network.startswith("stock-effseg-"):
        ways.insert(0, "stock torch")
    preset = network.removeprefix("stock-").removeprefix("effseg-")
    name = f"EffSegNet {preset}" if "effseg-" in network else NETWORKS.get(network, network)
    return ", ".join([name, *filter(None, ways)])


def colour(contender: str) -> str:
    """In pictures: of the network or, of one of ours, of its memory mode."""
    network, *rest = contender.split("/")
    by_memory = rest and is_ours(contender) and not is_converted(contender)
    return COLOURS.get(rest[0] if by_memory else network, OTHERS)


def is_ours(contender: str) -> bool:
    return contender.startswith("effseg-") or is_converted(contender)


def is_converted(contender: str) -> bool:
    """As in "nnunet/raw/auto": another's network with a memory mode."""
    return contender.count("/") == 2 and not contender.startswith("effseg-")


def is_on_gpu(record: Record) -> bool:
    return record.machine["gpu"] is not None


def machine(record: Record) -> str:
    """As in "AMD EPYC, 2 threads, torch 2.13.0", or the GPU's name in front."""
    versions = f"torch {record.versions['torch']}"
    if is_on_gpu(record):
        driver = record.machine["driver"]
        tuned = ["tuned kernels"] if record.conditions.get("tuned") else []
        drivers = [f"driver {driver}"] if driver else []
        return ", ".join([record.machine["gpu"], versions, *drivers, *tuned])
    threads = record.machine["threads"]
    return f"{record.machine['cpu']}, {threads} thread{'s' * (threads != 1)}, {versions}"
