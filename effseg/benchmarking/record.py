"""The results of one benchmark run on one machine, as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from effseg.common.atomic import atomic_path
from effseg.doctor import versions as package_versions
from effseg.errors import InputError

SCHEMA = 1
SUITES = ("memory", "throughput", "kernels")
CHECKS = "checks"
"""Suite of what is asked of a machine before anything is timed: the reason says what was found."""
STATUSES = ("ok", "skipped", "out of memory", "failed", "wrong")
"""failed: its process or its GPU was lost, or it took too long."""
INTERRUPTED = "interrupted"
"""The reason of what was skipped because somebody ended the run."""
MACHINE = ("cpu", "threads", "gpu", "gpu_memory", "driver", "clocks_before", "clocks_after")
VERSIONS = ("python", "torch", "triton", "cudnn", "effseg", "commit")


@dataclass(frozen=True)
class Row:
    """One result. Metrics that were not measured are None.

    task: "train" (forward, loss, backward), "infer", or a kernel's operator; dtype: bf16 or fp32; reason: why
    the status is not ok, or what a check has found; seconds: 20th, 50th and 80th percentile of one run;
    bytes: allocated and reserved at the measured peak; predicted: of a whole training step with AdamW, in
    tensors; predicted_reserved: for it by the allocator of a GPU, convolution workspace included;
    outside_convolutions: of the same, measured on a CPU; moved: of an operator, to and from memory at the
    least, each operand read once and each result written once; parameters: how many; macs:
    multiply-accumulates of the step, or of the operator.
    """

    suite: str
    contender: str
    workload: str
    dtype: str
    task: str = "train"
    status: str = "ok"
    reason: str = ""
    voxels: int | None = None
    seconds_p20: float | None = None
    seconds_p50: float | None = None
    seconds_p80: float | None = None
    voxels_per_second: float | None = None
    bytes_allocated: int | None = None
    bytes_reserved: int | None = None
    bytes_outside_convolutions: int | None = None
    bytes_predicted: int | None = None
    bytes_predicted_reserved: int | None = None
    bytes_moved: int | None = None
    parameters: int | None = None
    macs: int | None = None


ADDED = ("bytes_predicted_reserved",)
"""Metrics that older records lack."""
METRICS = tuple(field.name for field in fields(Row) if field.default is None)


@dataclass(frozen=True)
class Record:
    """machine: MACHINE; versions: VERSIONS; conditions: what else decides the figures (rounds, flags ...), as
    JSON."""

    machine: dict[str, Any]
    versions: dict[str, str | None]
    conditions: dict[str, Any]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "versions": self.versions,
            "conditions": self.conditions,
            "rows": [asdict(row) for row in self.rows],
        }


def begin(**conditions: Any) -> Record:
    """A record of this machine without rows, its GPU's clocks as they are before the run."""
    return Record(machine(), versions(), conditions, ())


def finish(record: Record, rows: Sequence[Row]) -> Record:
    """The record with its rows and the GPU's clocks as they are now."""
    after = record.machine | {"clocks_after": _gpu()["clocks"]}
    return Record(after, record.versions, record.conditions, (*record.rows, *rows))


def machine() -> dict[str, Any]:
    """This one; what a GPU would have is None without one. Clocks are the driver's, in MHz."""
    gpu = _gpu()
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu["name"],
        "gpu_memory": gpu["memory"],
        "driver": gpu["driver"],
        "clocks_before": gpu["clocks"],
        "clocks_after": None,
    }


def processor() -> str:
    """The CPU's model, as its maker calls it."""
    info = Path("/proc/cpuinfo")
    names = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((n.split(":", 1)[1].strip() for n in names if n.startswith("model name")), platform.machine())


def versions() -> dict[str, str | None]:
    """Of what decides speed and memory; None: not there."""
    found = package_versions() | {"torch": torch.__version__, "commit": commit()}
    return {name: found[name] for name in VERSIONS}


def commit() -> str | None:
    """Of the checkout that this package runs from, with "+" where files differ from it; None outside one."""
    here = Path(__file__).parent
    known = _output("git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name)
    head = _output("git", "-C", str(here), "rev-parse", "HEAD")
    if known is None or head is None:
        return None
    changed = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "")


def _gpu() -> dict[str, Any]:
    """Name, memory in bytes, driver, and clocks (as in "sm 1980, memory 2619") of torch's current GPU."""
    found: dict[str, Any] = dict.fromkeys(("name", "memory", "driver", "clocks"))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"name": properties.name, "memory": properties.total_memory}
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem"
        # nvidia-smi counts all GPUs, torch those that it is shown: name it by what both know.
        which = f"--id=GPU-{properties.uuid}"
        told = _output("nvidia-smi", query, "--format=csv,noheader,nounits", which)
        if told is not None and told.count(",") == 2:
            driver, sm, memory = (part.strip() for part in told.split(","))
            found |= {"driver": driver, "clocks": f"sm {sm}, memory {memory}"}
    return found


def _output(*command: str) -> str | None:
    """What the command prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write(record: Record, path: str | os.PathLike[str]) -> None:
    """Whole or not at all; checked first."""
    text = json.dumps(record.to_dict(), indent=1, allow_nan=False) + "\n"
    validate(json.loads(text))
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read(path: str | os.PathLike[str]) -> Record:
    """Raises InputError, which names the file, for one that `validate` refuses."""
    try:
        return validate(json.loads(Path(path).read_text(encoding="utf-8")))
    except (InputError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a benchmark record, got {error}") from None


def validate(data: Any) -> Record:
    """The record that parsed JSON holds. Raises InputError for anything else."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"schema: expected {SCHEMA}, got {schema!r}")
    _check_keys(data, ("schema", "machine", "versions", "conditions", "rows"), "record")
    _check_keys(data["machine"], MACHINE, "machine")
    _check_keys(data["versions"], VERSIONS, "versions")
    if not isinstance(data["conditions"], dict):
        raise InputError("conditions: expected an object")
    if not isinstance(data["rows"], list):
        raise InputError("rows: expected a list")
    rows = tuple(_row(row, f"rows[{i}]") for i, row in enumerate(data["rows"]))
    return Record(data["machine"], data["versions"], data["conditions"], rows)


def _row(data: Any, where: str) -> Row:
    if isinstance(data, dict):
        data = {**dict.fromkeys(ADDED), **data}
    _check_keys(data, tuple(field.name for field in fields(Row)), where)
    for name, value in data.items():
        if name in METRICS:
            number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
            if value is not None and not number:
                raise InputError(f"{where}.{name}: expected a number of 0 or more, or null, got {value!r}")
        elif not isinstance(value, str):
            raise InputError(f"{where}.{name}: expected a text, got {value!r}")
    for name, known in (("suite", (*SUITES, CHECKS)), ("status", STATUSES)):
        if data[name] not in known:
            raise InputError(f"{where}.{name}: expected one of {', '.join(known)}, got {data[name]!r}")
    if data["status"] != "ok" and not data["reason"]:
        raise InputError(f"{where}.reason: expected one, for the status is {data['status']!r}")
    return Row(**data)


def _check_keys(data: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected an object, got {type(data).__name__}")
    if data.keys() != set(known):
        wrong = sorted(data.keys() ^ set(known))
        raise InputError(f"{where}: expected the keys {', '.join(known)}; {', '.join(wrong)} differ")
