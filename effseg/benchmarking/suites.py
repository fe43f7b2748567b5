"""Whole suites, for `effseg bench`: one record of what was selected, run, or left out, and why.

On a GPU every workload of a contender has a process of its own. On a CPU contenders take turns in this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from effseg.benchmarking import memory, throughput
from effseg.benchmarking.groups import Group, Show, measure
from effseg.benchmarking.journal import Journal, continued
from effseg.benchmarking.record import SUITES, Record, Row, begin
from effseg.benchmarking.registry import (
    DTYPES,
    ONLY_COMPILED,
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


def run(
    suites: Sequence[str] = SUITES,
    *,
    full: bool = False,
    compiled: bool = False,
    device: torch.device,
    dtypes: Sequence[str] | None = None,
    seconds: float | None = None,
    path: Path | None = None,
    resume: bool = False,
    show: Show | None = None,
) -> Record:
    """Everything that the suites select, and a skipped row for every other contender.

    compiled: also contenders that torch.compile makes, which takes minutes each. dtypes: None: bf16 and fp32;
    on a CPU only fp32 is timed then. seconds: about how long to measure: what has not begun by then is
    skipped. path: of a file that holds the record after every row. resume: go on with the record that is
    there. show: called with each row. KeyboardInterrupt ends the measuring: what is left is skipped. Raises
    InputError for unknown suites and dtypes, and for a record that this one cannot go on with.
    """
    for option, asked, known in (("suite", suites, SUITES), ("dtype", dtypes or (), DTYPES)):
        if unknown := [name for name in asked if name not in known]:
            raise InputError(f"{option}: expected one of {', '.join(known)}, got {unknown[0]!r}")
    record = begin(
        suites=list(suites), full=full, compiled=compiled, device=str(device), rounds=ROUNDS, seconds=seconds,
        tf32=torch.backends.cudnn.allow_tf32,
    )  # fmt: skip
    if resume and path is not None:
        record = continued(record, path)
    journal = Journal(record, path)
    groups = [list(_groups(suite, full, compiled, device, dtypes)) for suite in suites]
    measure(groups, math.inf if seconds is None else seconds, journal, show or (lambda row: None))
    return journal.close(
        row for suite in suites for row in unselected(suite, full, dtypes or DTYPES, compiled)
    )


def unselected(suite: str, full: bool, dtypes: Sequence[str] = DTYPES, compiled: bool = False) -> list[Row]:
    """Rows of the registry's contenders that the suite does not run; the kernels suite has its own."""
    if suite not in SELECTIONS:
        return []
    names = {case.contender.name for case in select(suite, full, compiled)}
    return [
        Row(
            suite, name, SELECTIONS[suite][full].workloads[0], dtype, status="skipped",
            reason=_why_not(suite, name, full),
        )
        for name in contenders()
        if name not in names
        for dtype in dtypes
    ]  # fmt: skip


def _why_not(suite: str, name: str, full: bool) -> str:
    short, long = SELECTIONS[suite]
    if name not in long.contenders:
        return "not in this suite's selection"
    if not full and name not in short.contenders:
        return ONLY_FULL
    return ONLY_COMPILED


# What a suite measures together


def _groups(
    suite: str, full: bool, compiled: bool, device: torch.device, dtypes: Sequence[str] | None
) -> Iterator[Group]:
    timed = dtypes or (DTYPES if device.type == "cuda" else ("fp32",))
    if suite == "memory":
        yield from _memory(select("memory", full, compiled), device, dtypes or DTYPES)
    elif suite == "throughput":
        yield from _throughput(select("throughput", full, compiled), device, timed)
    else:
        yield from _kernels(full, compiled, device, timed)


def _memory(cases: Sequence[Case], device: torch.device, dtypes: Sequence[str]) -> Iterator[Group]:
    """Predictions; on a GPU measured beside them, on a CPU a few small ones."""
    if device.type == "cuda":
        for dtype in dtypes:
            for case in _ours_first(cases):
                yield _memory_of(case, dtype, device, measured=True)
        return
    for case in cases:
        for dtype in dtypes:
            yield _memory_of(case, dtype, device, measured=False)
    if "fp32" in dtypes:
        for name in MEASURED_ON_CPU:
            yield _memory_of(Case(contenders()[name], SMALL), "fp32", device, measured=True)


def _memory_of(case: Case, dtype: str, device: torch.device, measured: bool) -> Group:
    run = partial(_memory_row, *_names(case), dtype, device if measured else None)
    return Group((memory.blank(case, dtype),), run, isolated=device.type == "cuda")


def _memory_row(
    contender: str, workload: str, dtype: str, device: torch.device | None,
    wanted: Sequence[Row], seconds: float, show: Show,
) -> None:  # fmt: skip
    case = _case(contender, workload)
    show(memory.predicted(case, dtype) if device is None else memory.measured(case, dtype, device))


def _throughput(cases: Sequence[Case], device: torch.device, dtypes: Sequence[str]) -> Iterator[Group]:
    """On a CPU a race for each workload and dtype."""
    by_workload: dict[Workload, list[Case]] = {}
    for case in cases:
        by_workload.setdefault(case.workload, []).append(case)
    if device.type == "cuda":
        for dtype in dtypes:
            for racing in by_workload.values():
                for case in _ours_first(racing):
                    yield race([case], dtype, device)
        return
    for racing in by_workload.values():
        for dtype in dtypes:
            yield race(racing, dtype, device)


def race(
    cases: Sequence[Case],
    dtype: str,
    device: torch.device,
    tasks: Sequence[str] = TASKS,
    most: float = math.inf,
) -> Group:
    """Of one workload; on a GPU in a process of their own. most: seconds, as of `throughput.rows`."""
    blanks = tuple(throughput.blank(case, dtype, task) for task in tasks for case in cases)
    names = [case.contender.name for case in cases]
    run = partial(_race, names, cases[0].workload.name, dtype, device, most)
    return Group(blanks, run, isolated=device.type == "cuda")


def _race(
    names: Sequence[str], workload: str, dtype: str, device: torch.device, most: float,
    wanted: Sequence[Row], seconds: float, show: Show,
) -> None:  # fmt: skip
    cases = [_case(name, workload) for name in names]
    tasks = list(dict.fromkeys(row.task for row in wanted))
    throughput.rows(cases, dtype, device, tasks=tasks, seconds=min(seconds, most), measure=True, show=show)


def _ours_first(cases: Sequence[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: not case.contender.is_ours)


def _names(case: Case) -> tuple[str, str]:
    """What another process finds it by: networks' makers cannot be pickled."""
    return case.contender.name, case.workload.name


def _case(contender: str, workload: str) -> Case:
    return Case(contenders()[contender], workloads()[workload])


def _kernels(full: bool, compiled: bool, device: torch.device, dtypes: Sequence[str]) -> Iterator[Group]:
    """On a GPU each operator in a process of its own."""
    if reason := missing(contenders()["effseg-base/raw/triton"]):
        row = Row(
            "kernels", "operators/triton", OPERATORS[full][0], dtypes[0], status="skipped", reason=reason
        )
        yield Group((row,), lambda wanted, seconds, show: show(row))
        return
    from effseg.benchmarking import operators

    cpu = torch.device("cpu")  # to list them
    for dtype in dtypes:
        for i, name in enumerate(OPERATORS[full]):
            found = operators.operators(workloads()[name], dtype, cpu, compiled, heads_only=i > 0)
            blanks = [[operator.blank(c, dtype) for c in operator.contenders] for operator in found]
            run = partial(_operators, name, dtype, device, compiled)
            if device.type == "cuda":
                yield from (Group(tuple(rows), run, isolated=True) for rows in blanks)
            else:
                yield Group(tuple(row for rows in blanks for row in rows), run)


def _operators(
    workload: str, dtype: str, device: torch.device, compiled: bool,
    wanted: Sequence[Row], seconds: float, show: Show,
) -> None:  # fmt: skip
    from effseg.benchmarking import operators

    names = {row.contender.rpartition("/")[0] for row in wanted}
    operators.rows(
        workloads()[workload], dtype, device, compiled=compiled, names=names, seconds=seconds, show=show
    )
