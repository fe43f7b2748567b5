"""The search for a problem's fastest configuration among those that agree with ATen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.expressions.slabs import Window
from effseg.kernels.choose import uses_aten
from effseg.kernels.config import ATEN, LOOPS, Config, Problem
from effseg.kernels.conv3d_host import SLIDE_CHANNELS
from effseg.kernels.conv3d_wgrad import marches
from effseg.kernels.heuristics import contraction, heuristic
from effseg.tuning.trials import Trial, trial

MOST_CANDIDATES = 16
"""Configurations tried for a problem: each takes seconds to compile."""
TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 5e-3}
"""Relative error against ATen: either may use TF32, and ATen rounds between its passes."""
FLIPPED = 0.05
"""Share of voxels whose classes may differ where ATen rounds logits, so that two are alike."""

Timer = Callable[[Sequence[Callable[[], object]]], list[list[float]]]
"""The seconds of every round, for each function; rounds are interleaved."""


# What is tried


def starts(problem: Problem) -> list[Config]:
    """The heuristic's configuration, one for every other loop that can do the problem, and ATen."""
    found = [heuristic(problem)]
    if problem.op.startswith("conv3d"):
        found += [heuristic(problem, loop) for loop in _loops(problem)]
        found.append(Config(ATEN))
    return list(dict.fromkeys(found))


def _loops(problem: Problem) -> Iterator[str]:
    window = Window(problem.kernel, problem.stride)
    channels = (problem.in_channels, problem.out_channels)
    depth, _ = contraction(problem)
    for loop in LOOPS[problem.op]:
        if problem.op == "conv3d_wgrad":
            possible = loop == "tap" or marches(loop, window, *channels)
        elif loop == "slide":
            possible = window == Window((3, 3, 3)) and depth <= SLIDE_CHANNELS
        else:  # "few" is unrolled
            possible = loop == "tap" or depth < 16
        if possible:
            yield loop


def neighbours(config: Config, products: bool) -> list[Config]:
    """One field twice or half as large; what a loop does not have is 0 and stays so.

    products: whether the tile is that of a matrix product, at least 16 in every direction.
    """
    found = []
    for name in ("block_w", "block_h", "block_n", "num_warps", "block_k", "block_d", "splits", "num_stages"):
        value = getattr(config, name)
        for other in (2 * value, value // 2) if name != "num_stages" else (value + 1, value - 1):
            candidate = replace(config, **{name: other})
            if value and _sensible(candidate, products):
                found.append(candidate)
    return found


def _sensible(config: Config, products: bool) -> bool:
    least = 16 if products else 1
    voxels = max(config.block_h, 1) * config.block_w
    return (
        voxels >= least
        and min(config.block_n or least, config.block_k or least) >= least
        # Accumulators, or values, that registers can hold at all.
        and voxels * max(config.block_n, 1) <= 8192 * config.num_warps
        and 1 <= config.num_warps <= 8
        and 1 <= config.num_stages <= 4
        and all(getattr(config, name) <= 128 for name in ("block_d", "block_n", "block_k"))
    )


# Measuring


class Measurement(NamedTuple):
    """Seconds; spread: between the first and the last fifth of the rounds."""

    median: float
    spread: float


@dataclass
class Search:
    """One problem's: what was measured, and what was dropped and why."""

    measured: dict[Config, Measurement] = field(default_factory=dict)
    dropped: dict[Config, str] = field(default_factory=dict)

    @property
    def best(self) -> Config:
        return min(self.measured, key=lambda config: self.measured[config].median)

    @property
    def best_kernel(self) -> Config | None:
        kernels = [config for config in self.measured if not uses_aten(config)]
        return min(kernels, key=lambda config: self.measured[config].median, default=None)

    @property
    def leaders(self) -> list[Config]:
        """The fastest kernel and ATen, of those that were measured."""
        return [c for c in (self.best_kernel, Config(ATEN)) if c in self.measured]

    def seconds(self, config: Config | None) -> float | None:
        """None for what was not measured."""
        return self.measured[config].median if config in self.measured else None


@torch.no_grad()
def search(problem: Problem, device: torch.device, timer: Timer, most: int = MOST_CANDIDATES) -> Search:
    """Climb from the fastest kernel of `starts` to its fastest neighbour until none is faster or `most` were
    tried; ATen, where it contends, is timed again beside them."""
    found, wave = Search(), starts(problem)
    try:
        run = trial(problem, device)
        expected = run.aten()
    except torch.OutOfMemoryError:
        found.dropped = dict.fromkeys(wave, "out of memory for what it is checked against")
        return found
    products = problem.op.startswith("conv3d")
    while wave:
        right = [c for c in wave if _is_right(run, c, expected, problem.dtype, found)]
        _measure(run, [*found.leaders, *right], timer, found)
        if found.best_kernel is None:
            break
        tried = found.measured.keys() | found.dropped.keys()
        around = [c for c in neighbours(found.best_kernel, products) if c not in tried]
        wave = around[: max(0, most - len(tried))]
    return found


def _is_right(run: Trial, config: Config, expected: Sequence[Tensor], dtype: str, found: Search) -> bool:
    """Whether a candidate runs and agrees with ATen; the reason is kept where not."""
    try:
        wrong = disagreement(run(config), expected, dtype)
    except Exception as error:  # whatever the compiler or the driver raises
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        # An error that the device does not recover from is no candidate's alone.
        if expected[0].is_cuda:
            torch.cuda.synchronize()
    if wrong:
        found.dropped[config] = wrong
    return not wrong


def disagreement(got: Sequence[Tensor], expected: Sequence[Tensor], dtype: str) -> str:
    """What is wrong with results, or nothing. Features are compared row by row, so that one wrong row, or
    column, shows among thousands."""
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if ours.shape != theirs.shape:
            return f"result {i}: shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        if not ours.is_floating_point():
            flipped = float((ours != theirs).float().mean())
            if flipped > FLIPPED:
                return f"result {i}: {flipped:.1%} of voxels differ"
            continue
        error = worst_row(ours, theirs)
        if not error <= TOLERANCE[dtype]:
            return f"result {i}: relative error {error:.1e}"
    return ""


def worst_row(ours: Tensor, theirs: Tensor) -> float:
    """The largest relative error of a row of features, or the relative error of anything else."""
    rows = zip(ours.unbind(2), theirs.unbind(2), strict=True) if ours.dim() == 5 else ((ours, theirs),)
    errors = []
    for a, b in rows:
        a, b = a.double(), b.double()
        errors.append((a - b).norm() / b.norm().clamp_min(1e-30))
    # NaN is what max gives of any NaN.
    return float(torch.stack(errors).max())


def _measure(run: Trial, wave: Sequence[Config], timer: Timer, found: Search) -> None:
    rows = timer([partial(run, config) for config in wave]) if wave else []
    for config, seconds in zip(wave, rows, strict=True):
        fifth = len(seconds) // 5
        ordered = sorted(seconds)
        spread = ordered[len(ordered) - 1 - fifth] - ordered[fifth]
        found.measured[config] = Measurement(statistics.median(ordered), spread)
