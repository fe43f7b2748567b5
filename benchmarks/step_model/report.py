"""What the model answers, as rows, as a table on the terminal and as a section of benchmarks/README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.step_model.devices import DEVICES, Assumptions
from benchmarks.step_model.model import Kernel, Modelled
from effseg.common.atomic import atomic_path
from effseg.errors import InputError

TITLE = "Model of a GPU step (on paper: no GPU has run this)"
BEGIN, END = "<!-- model: step -->", "<!-- model ends -->"
SCHEMA = 1
TOP = 3

COLUMNS = (
    "step", "volume", "route", "device", "GPU, modelled ms", "host, assumed ms", "launches", "break even",
    "three that take most: modelled ms, held by",
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One step by one route on one device. break_even: the part of the tensor rate that cuDNN would have to
    reach for the step to take as long as by kernels; None where none would do, or nothing is cuDNN's."""

    step: str
    volume: str
    route: str
    device: str
    modelled: Modelled
    break_even: float | None = None

    def row(self, top: int) -> Row:
        """Times in ms."""
        found = self.modelled
        return {
            "step": self.step,
            "volume": self.volume,
            "route": self.route,
            "device": self.device,
            "modelled_ms": _ms(found.device),
            "host_ms": _ms(found.host),
            "launches": found.launches,
            "break_even": self.break_even,
            "kernels": [_kernel(kernel) for kernel in found.kernels[:top]],
        }


def _kernel(kernel: Kernel) -> Row:
    return {
        "name": kernel.name,
        "launches": kernel.launches,
        "ms": _ms(kernel.seconds),
        "limit": kernel.limit,
        **{what: _ms(getattr(kernel, what)) for what in ("bytes", "issue", "tensor", "gaps", "floor")},
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def document(rows: Sequence[Row], assumed: Assumptions) -> Row:
    return {
        "schema": SCHEMA,
        "what": TITLE,
        "assumptions": asdict(assumed),
        "devices": {name: asdict(device) for name, device in DEVICES.items()},
        "rows": list(rows),
    }


def table(rows: Sequence[Row]) -> Table:
    found = Table(title=TITLE, box=None, header_style="bold")
    for name in ("step", "volume", "route", "device"):
        found.add_column(name)
    for name in ("GPU ms", "host ms", "launches"):
        found.add_column(name, justify="right")
    found.add_column("most of it: ms (held by; floor)")
    for row in rows:
        found.add_row(
            row["step"], row["volume"], row["route"], row["device"], f"{row['modelled_ms']:.1f}",
            f"{row['host_ms']:.1f}", str(row["launches"]), "\n".join(map(_line, row["kernels"])),
        )  # fmt: skip
    return found


def _line(kernel: Row) -> str:
    return f"{kernel['name']}: {kernel['ms']:.2f} ({kernel['limit']}; {kernel['floor']:.2f})"


def markdown(rows: Sequence[Row], assumed: Assumptions) -> str:
    """What stands between BEGIN and END."""
    lines = [
        "Nothing here is a measurement. Of every launch of a training step (forward, loss, backward, AdamW; "
        "bf16, 15 classes): the largest of bytes / bandwidth, issue clocks and tensor clocks of its machine "
        f"code at the boost clock, plus {assumed.gap * 1e6:g} us of gap. The host is taken to need "
        f"{assumed.host * 1e6:g} us for an operator that launches something and "
        f"{assumed.host_view * 1e6:g} us for any other; cuDNN to reach {assumed.library_share:.0%} of the "
        f"tensor rate on channels padded to {assumed.library_channels}. Those are assumptions. Caches and "
        "latencies are not modelled. Break even: the part of the tensor rate with which cuDNN's route would "
        "take as long on the GPU as the kernels' (- where the whole rate would not do).",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- " * len(COLUMNS) + "|",
    ]
    for row in rows:
        kernels = "; ".join(f"{k['name']} {k['ms']:.1f} {k['limit']}" for k in row["kernels"][:TOP])
        even = row.get("break_even")
        cells = (
            row["step"], row["volume"], row["route"], row["device"], f"{row['modelled_ms']:.0f}",
            f"{row['host_ms']:.0f}", str(row["launches"]), f"{even:.0%}" if even else "-", kernels,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_json(path: Path, found: Row) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def put_into(page: Path, text: str) -> None:
    """Raises InputError for a page without the section."""
    before = page.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        raise InputError(f"{page}: expected one line {BEGIN} and one {END}")
    head, rest = before.split(BEGIN)
    after = f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"
    with atomic_path(page) as temporary:
        temporary.write_text(after, encoding="utf-8")
