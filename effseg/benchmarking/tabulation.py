"""Records as tables, for a terminal and for Markdown.

A table says nothing that is not in the records; what they lack is "not measured".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effseg.benchmarking import peaks, results
from effseg.benchmarking.record import Record, Row
from effseg.memory.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NOT_MEASURED = "not measured"
BASELINE = "unet3d/eager"
"""Whose memory is 100 %."""
TWIN = "stock-effseg-base/eager"
"""Whose time is 1: what remains is the implementation."""
KERNEL_CONTENDERS = ("aten", "triton", "eager", "compile")
MEMORY_CONTENDERS = (
    BASELINE, "unet3d/checkpoint", "nnunet/eager", "nnunet/checkpoint", TWIN, "effseg-base/raw/auto",
    "effseg-base/stream/auto", "effseg-base/stream+1/auto",
)  # fmt: skip
MEMORY_COLUMNS = (
    "network", "predicted peak", "of the 3D U-Net's", "bytes per voxel", "predicted reserved", "measured",
    "parameters",
)  # fmt: skip
SHOWN = 4
"""Of the contenders that were not run; all are in the record."""


@dataclass(frozen=True)
class Table:
    """title: what all its rows have in common; emphasised: numbers of the rows that are ours."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    emphasised: frozenset[int] = frozenset()

    def markdown(self) -> str:
        """Without the title."""
        lines = [self.columns, ("---",) * len(self.columns)]
        for i, row in enumerate(self.rows):
            first, *rest = row
            lines.append((f"**{first}**" if i in self.emphasised else first, *rest))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rich(self) -> RichTable:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.title), title_justify="left", box=SIMPLE_HEAD)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=not i, overflow="fold")
        for i, row in enumerate(self.rows):
            table.add_row(*map(escape, row), style="bold" if i in self.emphasised else None)
        return table


# Memory


def memory(
    records: Iterable[Record],
    workload: str = "512x512x512, 15 classes",
    dtype: str = "bf16",
    contenders: Sequence[str] = MEMORY_CONTENDERS,
) -> Table:
    """The predicted peak of a training step beside the measured one, of these contenders in this order.

    What was measured is tensors, the allocator's reserve, and the device. An algorithm that was left to
    choose is predicted as ATen, whose figures stand for it where it has none of its own.
    """
    predicted, measured = {}, {}
    found = list(records)
    wanted = {"workload": workload, "dtype": dtype, "task": "train"}
    for _, row in results.rows(found, "memory", **wanted):
        if row.bytes_predicted is not None:
            predicted[row.contender] = row
    for suite in ("throughput", "memory"):
        for record, row in results.rows(found, suite, **wanted):
            if row.bytes_allocated is not None:
                measured[row.contender] = _bytes(row, record)
            elif row.status == "out of memory" and results.is_on_gpu(record):
                measured.setdefault(row.contender, f"out of memory ({_device(record)})")
    whole = predicted[BASELINE].bytes_predicted if BASELINE in predicted else None
    return Table(
        f"One training step on {workload}, {dtype}: peak memory",
        MEMORY_COLUMNS,
        tuple(
            (
                results.label(name),
                *_predicted(predicted.get(name), whole),
                measured.get(name) or measured.get(_by_aten(name), NOT_MEASURED),
                _millions(predicted.get(name)),
            )
            for name in contenders
        ),
        _ours(contenders),
    )


def _predicted(row: Row | None, whole: int | None) -> tuple[str, str, str, str]:
    """GiB, the part of the whole, bytes per voxel, and the GiB that are reserved."""
    if row is None or row.bytes_predicted is None:
        return ("not predicted",) * 4
    part = _percent(row.bytes_predicted / whole, 1) if whole else "not predicted"
    per_voxel = f"{row.bytes_predicted / row.voxels:.0f}" if row.voxels else "not predicted"
    reserved = row.bytes_predicted_reserved
    held = "not predicted" if reserved is None else format_bytes(reserved)
    return format_bytes(row.bytes_predicted), part, per_voxel, held


def _bytes(row: Row, record: Record) -> str:
    """As in "9.02 GiB, 9.61 GiB reserved (NVIDIA H200)"; a CPU reserves nothing."""
    reserved = "" if row.bytes_reserved is None else f", {format_bytes(row.bytes_reserved)} reserved"
    return f"{format_bytes(row.bytes_allocated or 0)}{reserved} ({_device(record)})"


def _by_aten(contender: str) -> str:
    network, _, how = contender.rpartition("/")
    return f"{network}/aten" if how == "auto" else contender


def _percent(part: float, digits: int = 0) -> str:
    return f"{100 * part:.{digits}f} %"


def _millions(row: Row | None) -> str:
    return "not counted" if row is None or row.parameters is None else f"{row.parameters / 1e6:.2f} M"


def _device(record: Record) -> str:
    return str(record.machine["gpu"]) if results.is_on_gpu(record) else "CPU"


def _ours(contenders: Iterable[str]) -> frozenset[int]:
    return frozenset(i for i, name in enumerate(contenders) if results.is_ours(name))


# Throughput


def throughput(record: Record, contenders: Collection[str] | None = None, **wanted: str) -> list[Table]:
    """One table for each workload, dtype and task of the record, of what was run: all of it, or only these
    contenders and rows whose fields have the values wanted."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for _, row in results.rows([record], "throughput", **wanted):
        if row.status != "skipped" and (contenders is None or row.contender in contenders):
            groups.setdefault((row.workload, row.dtype, row.task), []).append(row)
    return [_throughput(record, key, group) for key, group in groups.items()]


def _throughput(record: Record, key: tuple[str, str, str], rows: Sequence[Row]) -> Table:
    workload, dtype, task = key
    what = {"train": "training step", "infer": "segmentation"}.get(task, task)
    names = [row.contender for row in rows]
    unchanged = [name for name in names if name.endswith("/eager")]
    # Without our network's twin it is a race of another's network.
    reference = TWIN if TWIN in names or not unchanged else unchanged[0]
    twin = next((row for row in rows if row.contender == reference), None)
    return Table(
        f"One {what}, {workload}, {dtype}, relative to {results.label(reference)}; {results.machine(record)}",
        ("network", "seconds: median (20 % to 80 %)", "relative", "voxels/s", "peak memory", "relative"),
        tuple(
            (
                results.label(row.contender),
                _seconds(row),
                _ratio(row.seconds_p50, twin.seconds_p50 if twin else None),
                _per_second(row),
                NOT_MEASURED if row.bytes_allocated is None else format_bytes(row.bytes_allocated),
                _ratio(row.bytes_allocated, twin.bytes_allocated if twin else None),
            )
            for row in rows
        ),
        _ours(row.contender for row in rows),
    )


def _seconds(row: Row) -> str:
    """Or why there is no time."""
    if row.seconds_p50 is None:
        return NOT_MEASURED if row.status == "ok" else row.status
    spread = (row.seconds_p20, row.seconds_p80)
    known = f" ({spread[0]:.3g} to {spread[1]:.3g})" if None not in spread else ""
    return f"{row.seconds_p50:.3g}{known}"


def _ratio(value: float | None, reference: float | None) -> str:
    return NOT_MEASURED if value is None or not reference else f"{value / reference:.2f}x"


def _per_second(row: Row) -> str:
    return NOT_MEASURED if row.voxels_per_second is None else f"{row.voxels_per_second / 1e6:.3g} M"


# Kernels


def kernels(record: Record, **wanted: str) -> list[Table]:
    """One table for each dtype: operators by contender, in milliseconds and as the part of the least time
    that device memory and tensor cores allow."""
    by_dtype: dict[str, list[Row]] = {}
    for _, row in results.rows([record], "kernels", **wanted):
        by_dtype.setdefault(row.dtype, []).append(row)
    return [
        _kernels(record, dtype, rows)
        for dtype, rows in by_dtype.items()
        if any(row.seconds_p50 is not None for row in rows)
    ]


def _kernels(record: Record, dtype: str, rows: Sequence[Row]) -> Table:
    by_operator: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        operator, _, contender = row.contender.rpartition("/")
        by_operator.setdefault((operator, row.workload), {})[contender] = row
    return Table(
        f"Operators, {dtype}; {results.machine(record)}; ms, and the floor's part of it",
        ("operator", "size", "floor", *KERNEL_CONTENDERS),
        tuple(
            (operator, size, *_kernel_cells(record, found))
            for (operator, size), found in by_operator.items()
            if any(row.seconds_p50 is not None for row in found.values())
        ),
    )


def _kernel_cells(record: Record, found: dict[str, Row]) -> Iterator[str]:
    """The floor, then each contender's time."""
    floors = {name: peaks.floor_seconds(row, record.machine) for name, row in found.items()}
    floor = next((seconds for seconds in floors.values() if seconds is not None), None)
    yield "not known" if floor is None else f"{floor * 1e3:.3g}"
    for name in KERNEL_CONTENDERS:
        row = found.get(name)
        if row is None or row.seconds_p50 is None:
            yield NOT_MEASURED if row is None or row.status in ("ok", "skipped") else row.status
        else:
            part = "" if floor is None else f" ({_percent(floor / row.seconds_p50)})"
            yield f"{row.seconds_p50 * 1e3:.3g}{part}"


# What a run prints


def of_run(record: Record) -> list[Table]:
    """Every table of a record."""
    seen = dict.fromkeys((row.workload, row.dtype) for _, row in results.rows([record], "memory"))
    found = []
    for workload, dtype in seen:
        rows = results.rows([record], "memory", workload=workload, dtype=dtype, task="train")
        names = [r.contender for _, r in rows if r.bytes_predicted is not None or r.status != "skipped"]
        found += [memory([record], workload, dtype, names)] if names else []
    return [*found, *throughput(record), *kernels(record)]


def skipped(record: Record) -> list[str]:
    """A line for each reason why contenders were not run: how many, and the first of them."""
    reasons: dict[str, dict[str, None]] = {}
    for row in record.rows:
        if row.status == "skipped":
            reasons.setdefault(f"{row.suite}: {row.reason}", {})[row.contender] = None
    return [
        f"not run: {reason}: {len(names)} ({', '.join(list(names)[:SHOWN])}{', ...' * (len(names) > SHOWN)})"
        for reason, names in reasons.items()
    ]
