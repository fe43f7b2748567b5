"""What the compiler makes of a recorded launch, each specialisation compiled once and kept in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from effseg.common.atomic import atomic_path
from effseg.inspection import aot
from effseg.kernels.launch import Launch


@dataclass(frozen=True)
class Code:
    """issue: clocks in which a multiprocessor's schedulers hand out the instructions of a program's turn of
    its main loop; flops: of its tensor instructions; around: clocks of a turn of what encloses the loop."""

    issue: float
    flops: int
    around: float
    registers: int
    spills: int
    shared: int


def code_of(
    launch: Launch, architecture: str, folder: Path, show: Callable[[str], object] = lambda _: None
) -> Code:
    name = launch.kernel.__name__
    special = aot.specialisation(launch, architecture)
    key = f"{triton.__version__} {architecture} {launch.kernel.cache_key} {special}"
    path = folder / f"{name}-{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path.exists():
        return Code(**json.loads(path.read_text(encoding="utf-8")))
    show(f"{name} {architecture}")
    report = aot.examined(aot.compiled(launch, architecture))
    code = Code(
        report.main.issue, report.main.flops, report.around.issue,
        report.registers, report.spills, report.shared,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(asdict(code)) + "\n", encoding="utf-8")
    return code
