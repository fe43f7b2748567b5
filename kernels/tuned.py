"""Tuned files: measured configurations as data, a file a GPU. Pure Python."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from effseg.kernels.config import ATEN, LOOPS, Config, Problem, Triple, power_of_two

SCHEMA = 1
SHIPPED = Path(__file__).parent / "tuned"


def gpu_slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def cache_folder() -> Path:
    """Where a user's own measurements are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effseg" / "tuned"


def tuned_files(gpu: str) -> tuple[Path, ...]:
    """The user's file, then the shipped one; none without a GPU's name."""
    return _tuned_files(gpu, os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"), SHIPPED) if gpu else ()


@lru_cache(maxsize=64)
def _tuned_files(gpu: str, xdg: str | None, home: str | None, shipped: Path) -> tuple[Path, ...]:
    """Remembered for what it depends on: a path takes longer to make than a configuration to look up."""
    return cache_folder() / f"{gpu}.json", shipped / f"{gpu}.json"


def bucket(size: Triple) -> int:
    """Voxels, rounded up to a power of two: problems of one bucket share an entry."""
    return power_of_two(math.prod(size))


def key(problem: Problem) -> str:
    """What an entry of a tuned file is found by."""
    channels = f"{problem.in_channels}-{problem.out_channels}"
    axes = ["x".join(map(str, triple)) for triple in (problem.kernel, problem.stride)]
    prologue = "prologue" if problem.prologue else "plain"
    return " ".join(
        [
            problem.op,
            problem.dtype,
            channels,
            f"k{axes[0]}",
            f"s{axes[1]}",
            prologue,
            f"v{bucket(problem.size)}",
        ]
    )


@lru_cache(maxsize=1)
def compilers() -> Mapping[str, str]:
    """The installed versions of what measurements depend on."""
    found = {}
    for name in ("torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def tuned_document(
    entries: Mapping[str, Config], measured: Mapping[str, Mapping[str, Any]] | None = None, gpu: str = ""
) -> str:
    """The text of a tuned file. measured: what else is kept of an entry, as JSON; gpu: its name."""
    notes = measured or {}
    rows = {
        name: asdict(config) | ({"measured": dict(notes[name])} if name in notes else {})
        for name, config in sorted(entries.items())
    }
    document = {"schema": SCHEMA, "gpu": gpu, "versions": dict(compilers()), "entries": rows}
    return json.dumps(document, indent=1) + "\n"


class Tuned(dict[str, Config]):
    """Entries of a tuned file by `key`, and the problems that were looked for in them."""

    def __init__(self, entries: Mapping[str, Config] | None = None) -> None:
        super().__init__(entries or {})
        self.find = lru_cache(maxsize=4096)(self._find)

    def _find(self, problem: Problem) -> Config | None:
        return self.get(key(problem))


@lru_cache(maxsize=64)
def read_tuned(path: Path) -> Tuned:
    """Entries of a tuned file, read once a process. A corrupt or stale one has none, and a warning."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Tuned()
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"{path} is ignored: {error}", stacklevel=3)
        return Tuned()
    try:
        return Tuned(parse_tuned(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} is ignored: {error or type(error).__name__}", stacklevel=3)
        return Tuned()


def parse_tuned(text: str) -> dict[str, Config]:
    """Inverse of `tuned_document`; an error where a file is stale or an entry is not a configuration."""
    document = json.loads(text)
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']!r}, this version reads {SCHEMA}")
    for name, installed in compilers().items():
        written = document["versions"][name]
        if written.split(".")[:2] != installed.split(".")[:2]:
            raise ValueError(f"measured with {name} {written}, installed is {installed}: run `effseg tune`")
    entries = {
        name: Config(**{field: value for field, value in entry.items() if field != "measured"})
        for name, entry in document["entries"].items()
    }
    for name, config in entries.items():
        op = name.split(" ")[0]
        wrong = [
            f.name for f in fields(config) if f.name != "loop" and type(getattr(config, f.name)) is not int
        ]
        if wrong or config.loop not in (*LOOPS.get(op, ()), ATEN):
            raise ValueError(f"entry {name!r} is not a configuration")
    return entries
