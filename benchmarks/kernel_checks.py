"""Kernels on volumes of real size: what is run, and whether it is right. Needs Triton; nothing is timed.

A kernel is right where it agrees with ATen, and with ATen on the same numbers held in more digits; in low
precision it may be twice as far from that as ATen in low precision is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from effseg.benchmarking.failure import Failure, attempt
from effseg.common.isolation import isolated
from effseg.kernels.choose import choose, uses_aten
from effseg.kernels.config import Config, Problem, Triple
from effseg.kernels.heuristics import heuristic
from effseg.kernels.tuned import key
from effseg.tuning import autotune, trials
from effseg.tuning.search import disagreement, worst_row

MODEL, CLASSES = "effseg-base", 15
WIDTHS = (16, 32, 64)
"""Channels of the convolutions that are run whatever the network has, at full, half and quarter size."""
PASSES = ("conv3d_fwd", "conv3d_dgrad", "conv3d_wgrad")
MOST_ELEMENTS = 2**30
"""Of a tensor: ATen, which kernels are held against, counts in 32 bits in places."""
EXACT = {"bf16": torch.float32, "fp16": torch.float32, "fp32": torch.float64}
"""What a type's results are exact in, with TF32 off."""
SILENCE = 120.0
"""Seconds that a kernel may take to be compiled, run and compared."""
SLACK = 1e-3
"""Relative error that low precision may have beside twice ATen's: ATen gets some sums right to all digits."""

Results = Sequence[Tensor]


@dataclass(frozen=True)
class Check:
    """What came of a kernel. status: of `record.STATUSES`; error, aten_error: the kernel's and ATen's,
    relative to exact results, of that result of which the kernel's is the largest; None where there was no
    memory for exact ones, or the kernel gave nothing to compare."""

    kernel: str
    size: Triple
    config: str
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    aten_error: float | None = None

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        parts = [self.reason] if self.reason else []
        if self.error is not None:
            parts.append(f"error {self.error:.1e}, ATen's {self.aten_error:.1e}")
        elif self.status == "ok":
            parts.append("as ATen; no memory for exact results")
        return f"{self.kernel}, {size}, {self.config}: {self.status}: {'; '.join(parts)}"


# What is run


def needed(
    volume: Triple, dtype: str, architecture: str, gpu: str, listed: Sequence[Problem] | None = None
) -> list[Problem]:
    """The problems of the network and of `convolutions`, those that take longest first; of those that launch
    the same kernel the largest. listed: the network's; None: listed here, which takes half a minute."""
    if listed is None:
        listed = autotune.problems(MODEL, volume, [dtype], CLASSES, architecture)
    found: dict[tuple[Problem, Config], Problem] = {}
    for problem in (
        *listed,
        *convolutions(volume, dtype, architecture),
    ):
        problem = replace(problem, gpu=gpu)
        kernel = replace(problem, size=(0, 0, 0)), configuration(problem)
        largest = max(found.get(kernel, problem), problem, key=lambda p: math.prod(p.size))
        found[kernel] = largest
    return list(found.values())


def convolutions(volume: Triple, dtype: str, architecture: str) -> Iterator[Problem]:
    """3x3x3 at stride 1, all passes, with and without a prologue."""
    for level, width in enumerate(WIDTHS):
        d, h, w = (-(-n // 2**level) for n in volume)
        for op, prologue in product(PASSES, (True, False)):
            yield Problem(
                op, architecture, dtype, width, width, (d, h, w), kernel=(3, 3, 3), prologue=prologue
            )


def configuration(problem: Problem) -> Config:
    """As it is chosen, or as it would be were the problem not left to ATen."""
    chosen = choose(problem)
    return heuristic(problem) if uses_aten(chosen) else chosen


def identity(problem: Problem) -> tuple[str, str]:
    """What its `Check` is known by."""
    return key(problem), autotune.label(configuration(problem))


# Whether it is right


@torch.no_grad()
def check(problem: Problem, device: torch.device) -> Check:
    """Raises what the driver raises once the device is lost."""
    config = configuration(problem)
    size = trials.cropped(problem, MOST_ELEMENTS).size
    blank = Check(key(problem), size, autotune.label(config))
    exact = attempt(lambda: _exact(problem, device))
    found = attempt(lambda: _judged(blank, problem, device, config, exact))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if isinstance(found, Failure):
        return replace(blank, status=found.status, reason=found.reason)
    return found


def _exact(problem: Problem, device: torch.device) -> Results:
    torch.manual_seed(0)
    held = EXACT[problem.dtype]
    with _without_tf32():
        return trials.trial(problem, device, most=MOST_ELEMENTS, held=held).aten()


def _judged(
    blank: Check, problem: Problem, device: torch.device, config: Config, exact: Results | Failure
) -> Check:
    torch.manual_seed(0)
    run = trials.trial(problem, device, most=MOST_ELEMENTS)
    aten = run.aten()
    with _nan_where_nothing_is_written():
        got = run.kernel(config)
    reason = disagreement(got, aten, problem.dtype)
    if not reason and not all(map(torch.equal, got, run.kernel(config))):
        reason = "two runs differ"
    if isinstance(exact, Failure):
        failed = "" if exact.status == "out of memory" else f"of exact results: {exact.reason}"
        return _with_reasons(blank, reason, failed)
    if any(a.shape != b.shape for a, b in zip(got, exact, strict=True)):
        return _with_reasons(blank, reason)
    errors = [(distance(a, b), distance(c, b)) for a, b, c in zip(got, exact, aten, strict=True)]
    worse = next(filter(None, (_too_far(*pair, problem.dtype) for pair in errors)), "")
    ours, atens = max(errors)
    return replace(_with_reasons(blank, reason, worse), error=ours, aten_error=atens)


def _with_reasons(blank: Check, *reasons: str) -> Check:
    told = "; ".join(filter(None, reasons))
    return replace(blank, status="wrong" if told else "ok", reason=told)


def _too_far(ours: float, atens: float, dtype: str) -> str:
    """Nothing for fp32: either may use TF32, and only one may; `disagreement` has the bar."""
    if dtype == "fp32" or ours <= 2 * atens + SLACK:
        return ""
    return f"{ours:.1e} from exact, ATen {atens:.1e}"


def distance(got: Tensor, exact: Tensor) -> float:
    """The largest relative error of a row; of classes the share of voxels that differ."""
    if not exact.is_floating_point():
        return float((got != exact).float().mean())
    error = worst_row(got, exact)
    return error if math.isfinite(error) else math.inf


# How it is run


@contextmanager
def _nan_where_nothing_is_written() -> Iterator[None]:
    """Inside, torch fills what it allocates with NaN, integers with their largest value."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _without_tf32() -> Iterator[None]:
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


def run(
    problems: Sequence[Problem], device: torch.device, seconds: float, show: Callable[[Check], object]
) -> int:
    """Check one after the other and show each; the number of those left after so many seconds.

    On a GPU they share a process of their own. A kernel that takes it along, or is not done within SILENCE,
    has failed, and the others go on in the next one.
    """
    if device.type != "cuda":
        return len(problems) - _checked(problems, device, seconds, show)
    deadline, done = time.monotonic() + seconds, 0

    def tell(check: Check) -> None:
        nonlocal done
        done += 1
        show(check)

    while done < len(problems) and (left := deadline - time.monotonic()) > 0:
        rest = problems[done:]
        loss = isolated(partial(_checked, rest, device, left), tell, silence=SILENCE, seconds=left + SILENCE)
        if loss is None:
            break
        name, config = identity(problems[done])
        tell(Check(name, problems[done].size, config, "failed", loss.reason))
    return len(problems) - done


def _checked(
    problems: Sequence[Problem], device: torch.device, seconds: float, show: Callable[[Check], object]
) -> int:
    """How many were begun in time."""
    deadline = time.monotonic() + seconds
    for i, problem in enumerate(problems):
        if time.monotonic() >= deadline:
            return i
        show(check(problem, device))
    return len(problems)
