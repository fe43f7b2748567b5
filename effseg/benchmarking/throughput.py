"""Rows of the throughput suite: seconds of a training step and of an inference, contenders taking turns.

All networks of a race are on the device together, with AdamW's state (their activations are not), and share
one batch. On a GPU `effseg.benchmarking.suites` lets each run alone, in a process of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from effseg.benchmarking import gate, memory
from effseg.benchmarking.failure import Failure, attempt
from effseg.benchmarking.record import Row
from effseg.benchmarking.registry import COMPILED, Case, contenders, missing
from effseg.benchmarking.timing import ROUNDS, Stopwatch, Times, Turn, filled, race
from effseg.benchmarking.trainee import TASKS, Batch, GpuBytes, Trainee, gpu_peak
from effseg.memory.units import format_bytes

MOST_BYTES_PER_VOXEL = 5000
"""Of any contender's step: where a CPU has that, nothing needs to be predicted."""


def rows(
    cases: Sequence[Case],
    dtype: str,
    device: torch.device,
    *,
    tasks: Sequence[str] = TASKS,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    measure: bool = False,
    show: Callable[[Row], object] = lambda row: None,
    stopwatch: Stopwatch | None = None,
) -> list[Row]:
    """A row for each task and case; cases are of one workload. What is missing, wrong (see `gate`) or too
    large has no time.

    seconds: about how long to measure; what each contender needs to get ready, and three rounds, are not cut
    short. measure: on a CPU also the memory of a training step, as its allocator sees it; on a GPU that is
    always measured. show: called with each row. stopwatch: as in `race`.
    """
    if len({case.workload for case in cases}) > 1:
        raise ValueError("cases: expected those of one workload")
    deadline = time.monotonic() + seconds
    entered = _entered(cases, dtype, device)
    found = []
    for i, task in enumerate(tasks):
        trainees = {name: t for name, t in entered.items() if isinstance(t, Trainee)}
        peaks = _peaks(trainees, task, device)
        turns = {
            name: trainee.turn(task)
            for name, trainee in trainees.items()
            if not isinstance(peaks.get(name), Failure)
        }
        times = race(
            turns,
            device=device,
            rounds=rounds,
            seconds=max(0.0, deadline - time.monotonic()) / (len(tasks) - i),
            before=_settling(turns, peaks, device),
            stopwatch=stopwatch,
        )
        for case in cases:
            name, row = case.contender.name, blank(case, dtype, task)
            if device.type == "cuda" and task == "train":
                row = replace(row, bytes_predicted=memory.known(case, dtype).bytes_predicted)
            row = _filled(row, entered[name], peaks.get(name), times.get(name))
            if measure and task == "train" and device.type == "cpu" and row.status == "ok":
                row = memory.on_cpu(row, case, dtype)
            show(row)
            found.append(row)
    return found


# Who takes part


def _entered(cases: Sequence[Case], dtype: str, device: torch.device) -> dict[str, Trainee | Failure]:
    """Networks that compute the right thing, by name; for the others, why they are not timed."""
    refusals = {case.contender.name: _refusal(case, dtype, device) for case in cases}
    if any(case.contender.implementation in COMPILED for case in cases):
        # Else what was compiled for the gate's volume would be compiled anew for volumes of any size.
        torch.compiler.reset()
    batches: dict[torch.dtype, Batch] = {}
    entered: dict[str, Trainee | Failure] = {}
    for case in cases:
        refusal = refusals[case.contender.name]
        enter = partial(Trainee, case, dtype, device, batches)
        entered[case.contender.name] = attempt(enter) if refusal is None else refusal
    return entered


def _refusal(case: Case, dtype: str, device: torch.device) -> Failure | None:
    if reason := missing(case.contender, device):
        return Failure("skipped", reason)
    if device.type == "cpu" and (reason := _does_not_fit(case, dtype)):
        return Failure("out of memory", reason)
    wrong = attempt(lambda: gate.verdict(case.contender, dtype, device, case.workload.classes))
    if isinstance(wrong, Failure):
        return wrong
    return Failure("wrong", wrong) if wrong else None


def _does_not_fit(case: Case, dtype: str) -> str:
    """Why a step is not tried in the host's memory, where nothing raises: the system ends the process."""
    free = _available()
    if case.workload.voxels * MOST_BYTES_PER_VOXEL <= free:
        return ""
    contender = case.contender
    if memory.unpredictable(contender):
        contender = contenders()[f"{contender.network}/eager"]
    needed = memory.predict(Case(contender, case.workload), dtype, "cpu").peak
    return (
        "" if needed <= free else f"needs {format_bytes(needed)} as predicted, {format_bytes(free)} are free"
    )


def _available() -> float:
    """Bytes that the host can still give, as Linux estimates it; elsewhere there is no telling."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf
    )


# Memory of a GPU


def _peaks(trainees: Mapping[str, Trainee], task: str, device: torch.device) -> dict[str, GpuBytes | Failure]:
    """Of each trainee, which is then warm; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    peak = partial(gpu_peak, task=task, alone=len(trainees) == 1)
    return {name: attempt(partial(peak, trainee)) for name, trainee in trainees.items()}


def _settling(
    turns: Mapping[str, Turn], peaks: Mapping[str, GpuBytes | Failure], device: torch.device
) -> Callable[[str], object] | None:
    """What goes before a turn where torch cannot keep the blocks of all of them: else each would begin by
    giving back those of the one before it and asking the driver for its own."""
    if device.type != "cuda":
        return None
    kept = sum(peak.reserved for peak in peaks.values() if isinstance(peak, GpuBytes))
    if kept <= torch.cuda.get_device_properties(device).total_memory:
        return None

    def settle(name: str) -> None:
        torch.cuda.empty_cache()
        turns[name]()

    return settle


# Rows


def blank(case: Case, dtype: str, task: str) -> Row:
    contender, workload = case
    return Row("throughput", contender.name, workload.name, dtype, task, voxels=workload.voxels)


def _filled(
    row: Row, entered: Trainee | Failure, peak: GpuBytes | Failure | None, times: Times | Failure | None
) -> Row:
    """The first failure there is, or all the figures."""
    for found in (entered, peak):
        if isinstance(found, Failure):
            return filled(row, found)
    assert isinstance(entered, Trainee)
    assert times is not None
    row = replace(row, parameters=entered.parameters)
    if isinstance(peak, GpuBytes):
        row = replace(row, bytes_allocated=peak.allocated, bytes_reserved=peak.reserved)
    return filled(row, times)
