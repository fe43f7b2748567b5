"""Times of contenders that take turns: what slows a machine down for a while slows all of them down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from effseg.benchmarking.failure import Failure, attempt
from effseg.benchmarking.record import Row
from effseg.tuning.timer import cuda_seconds

ROUNDS = 7
LEAST_ROUNDS = 3
"""Whatever the time limit: fewer tell nothing of the spread."""

Turn = Callable[[], object]
Stopwatch = Callable[[Turn], float]
"""Runs a turn and gives its seconds."""


@dataclass(frozen=True)
class Times:
    """Seconds of every round, in order."""

    seconds: tuple[float, ...]

    @property
    def p20(self) -> float:
        return self._percentile(20)

    @property
    def p50(self) -> float:
        return self._percentile(50)

    @property
    def p80(self) -> float:
        return self._percentile(80)

    def _percentile(self, percent: int) -> float:
        return float(np.percentile(self.seconds, percent))


def race(
    turns: Mapping[str, Turn],
    *,
    device: torch.device,
    rounds: int = ROUNDS,
    warmup: int = 1,
    seconds: float = math.inf,
    before: Callable[[str], object] | None = None,
    stopwatch: Stopwatch | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Times | Failure]:
    """Times of each contender over `rounds`, in which all take turns, each round in another order.

    warmup: rounds before them that do not count. seconds: no round is begun after so long, but for the
    first LEAST_ROUNDS. before: called with a contender's name before each of its turns, outside its time.
    stopwatch: None: the host's clock on a CPU, else CUDA events. A contender that fails takes no further
    part and has no times.
    """
    watch = stopwatch or (partial(gpu_seconds, device) if device.type == "cuda" else host_seconds)
    found: dict[str, list[float]] = {name: [] for name in turns}
    failures: dict[str, Failure] = {}
    deadline = clock() + seconds

    def timed(name: str) -> float:
        if before is not None:
            before(name)
        return watch(turns[name])

    for i in range(-warmup, rounds):
        if i >= LEAST_ROUNDS and clock() >= deadline:
            break
        for name in _rotated(list(turns), i):
            if name in failures:
                continue
            taken = attempt(partial(timed, name))
            if isinstance(taken, Failure):
                failures[name] = taken
            elif i >= 0:
                found[name].append(taken)
    return {name: failures.get(name) or Times(tuple(taken)) for name, taken in found.items()}


def filled(row: Row, found: Times | Failure) -> Row:
    """The row with its times and what follows from them, or with why there are none."""
    if isinstance(found, Failure):
        return replace(row, status=found.status, reason=found.reason)
    return replace(
        row,
        seconds_p20=found.p20,
        seconds_p50=found.p50,
        seconds_p80=found.p80,
        voxels_per_second=None if row.voxels is None else row.voxels / found.p50,
    )


def host_seconds(turn: Turn) -> float:
    start = time.perf_counter()
    turn()
    return time.perf_counter() - start


def gpu_seconds(device: torch.device, turn: Turn, flush_bytes: int = 0) -> float:
    """flush_bytes: see `cuda_seconds`; 0 for what is much larger than the cache, and much slower than its
    launches."""
    return cuda_seconds(device, [turn], rounds=1, flush_bytes=flush_bytes)[0][0]


def _rotated(names: list[str], by: int) -> list[str]:
    start = by % len(names) if names else 0
    return names[start:] + names[:start]
