"""Whole suites, for `effseg bench`: one record of what was selected, run, or left out, and why."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from effseg.benchmarking import memory, throughput
from effseg.benchmarking.record import INTERRUPTED, SUITES, Record, Row, begin, finish
from effseg.benchmarking.registry import (
    DTYPES,
    ONLY_FULL,
    SELECTIONS,
    Case,
    Workload,
    contenders,
    missing,
    select,
    workloads,
)
from effseg.benchmarking.timing import ROUNDS
from effseg.benchmarking.trainee import TASKS
from effseg.errors import InputError

__all__ = ["SUITES", "run", "unselected"]

SMALL = workloads()["64x64x64, 15 classes"]
MEASURED_ON_CPU = (
    "stock-effseg-base/eager", "effseg-base/raw/aten", "effseg-base/stream/aten", "segresnet/eager",
)  # fmt: skip
"""Contenders whose memory is also measured without a GPU, on SMALL."""
OPERATORS = ("96x96x96, 15 classes",), ("512x512x128, 15 classes", "512x512x128, 105 classes")
"""Workloads of the kernels suite: by default, and with `full`; of all but the first only the heads."""

LATE = "the time limit was reached"

Show = Callable[[Row], object]


@dataclass(frozen=True)
class Group:
    """What is measured together. rows: without figures; run: given seconds and what to show rows with."""

    rows: tuple[Row, ...]
    run: Callable[[float, Show], list[Row]]


def run(
    suites: Sequence[str] = SUITES,
    *,
    full: bool = False,
    device: torch.device,
    dtypes: Sequence[str] | None = None,
    seconds: float | None = None,
    show: Show | None = None,
) -> Record:
    """Everything that the suites select, and a skipped row for every other contender.

    dtypes: None: bf16 and fp32; on a CPU only fp32 is timed then. seconds: about how long to measure: what
    has not begun by then is skipped. show: called with each row. KeyboardInterrupt ends the measuring: what
    is left is skipped. Raises InputError for unknown suites and dtypes.
    """
    for option, asked, known in (("suite", suites, SUITES), ("dtype", dtypes or (), DTYPES)):
        if unknown := [name for name in asked if name not in known]:
            raise InputError(f"{option}: expected one of {', '.join(known)}, got {unknown[0]!r}")
    limit = math.inf if seconds is None else seconds
    record = begin(
        suites=list(suites), full=full, device=str(device), rounds=ROUNDS, seconds=seconds,
        tf32=torch.backends.cudnn.allow_tf32,
    )  # fmt: skip
    groups = [list(_groups(suite, full, device, dtypes)) for suite in suites]
    rows = _measured(groups, limit, show or (lambda row: None))
    for suite in suites:
        rows += unselected(suite, full, dtypes or DTYPES)
    return finish(record, rows)


def _measured(suites: Sequence[Sequence[Group]], seconds: float, show: Show) -> list[Row]:
    """Suites share the time that is left when each begins, and so do the groups of a suite."""
    deadline = time.monotonic() + seconds
    found: list[Row] = []
    interrupted = False
    for i, groups in enumerate(suites):
        begun = time.monotonic()
        until = begun + (deadline - begun) / (len(suites) - i)
        for j, group in enumerate(groups):
            left = until - time.monotonic()
            done: list[Row] = []
            if left > 0 and not interrupted:
                try:
                    found += group.run(left / (len(groups) - j), partial(_note, done, show))
                    continue
                except KeyboardInterrupt:
                    interrupted = True
            found += done
            found += _skipped(group, done, INTERRUPTED if interrupted else LATE, show)
    return found


def _skipped(group: Group, done: Sequence[Row], reason: str, show: Show) -> list[Row]:
    """The group's rows that are not among those done."""
    known = {_identity(row) for row in done}
    rows = [
        replace(row, status="skipped", reason=reason) for row in group.rows if _identity(row) not in known
    ]
    for row in rows:
        show(row)
    return rows


def _note(done: list[Row], show: Show, row: Row) -> None:
    done.append(row)
    show(row)


def _identity(row: Row) -> tuple[str, ...]:
    return row.contender, row.workload, row.dtype, row.task


def unselected(suite: str, full: bool, dtypes: Sequence[str] = DTYPES) -> list[Row]:
    """Rows of the registry's contenders that the suite does not run; the kernels suite has its own."""
    if suite not in SELECTIONS:
        return []
    selection, long = SELECTIONS[suite][full], SELECTIONS[suite][True]
    return [
        Row(
            suite, name, selection.workloads[0], dtype, status="skipped",
            reason=ONLY_FULL if name in long.contenders else "not in this suite's selection",
        )
        for name in contenders()
        if name not in selection.contenders
        for dtype in dtypes
    ]  # fmt: skip


# What a suite measures together


def _groups(suite: str, full: bool, device: torch.device, dtypes: Sequence[str] | None) -> Iterator[Group]:
    timed = dtypes or (DTYPES if device.type == "cuda" else ("fp32",))
    if suite == "memory":
        yield from _memory(full, device, dtypes or DTYPES)
    elif suite == "throughput":
        yield from _throughput(full, device, timed)
    else:
        yield from _kernels(full, device, timed)


def _memory(full: bool, device: torch.device, dtypes: Sequence[str]) -> Iterator[Group]:
    """Predictions; on a GPU measured beside them, on a CPU a few small ones."""

    def group(case: Case, dtype: str, measure: bool) -> Group:
        def run(_: float, show: Show) -> list[Row]:
            row = memory.measured(case, dtype, device) if measure else memory.predicted(case, dtype)
            show(row)
            return [row]

        return Group((memory.blank(case, dtype),), run)

    on_gpu = device.type == "cuda"
    for case in select("memory", full):
        for dtype in dtypes:
            yield group(case, dtype, measure=on_gpu)
    if not on_gpu and "fp32" in dtypes:
        for name in MEASURED_ON_CPU:
            yield group(Case(contenders()[name], SMALL), "fp32", measure=True)


def _throughput(full: bool, device: torch.device, dtypes: Sequence[str]) -> Iterator[Group]:
    """A race for each workload and dtype."""
    by_workload: dict[Workload, list[Case]] = {}
    for case in select("throughput", full):
        by_workload.setdefault(case.workload, []).append(case)
    for cases in by_workload.values():
        for dtype in dtypes:
            blanks = tuple(throughput.blank(case, dtype, task) for task in TASKS for case in cases)
            yield Group(blanks, partial(_race, cases, dtype, device))


def _race(cases: Sequence[Case], dtype: str, device: torch.device, seconds: float, show: Show) -> list[Row]:
    return throughput.rows(cases, dtype, device, seconds=seconds, measure=True, show=show)


def _kernels(full: bool, device: torch.device, dtypes: Sequence[str]) -> Iterator[Group]:
    if reason := missing(contenders()["effseg-base/raw/triton"]):
        row = Row(
            "kernels", "operators/triton", OPERATORS[full][0], dtypes[0], status="skipped", reason=reason
        )
        yield Group((row,), lambda seconds, show: [row])
        return
    from effseg.benchmarking import operators

    def run(workload: Workload, dtype: str, heads_only: bool, seconds: float, show: Show) -> list[Row]:
        return operators.rows(
            workload, dtype, device, compiled=full, heads_only=heads_only, seconds=seconds, show=show
        )

    for i, name in enumerate(OPERATORS[full]):
        for dtype in dtypes:
            blanks = tuple(
                operator.blank(contender, dtype)
                for operator in operators.operators(workloads()[name], dtype, device, heads_only=i > 0)
                for contender in operator.contenders
            )
            yield Group(blanks, partial(run, workloads()[name], dtype, i > 0))
