"""Rows of the kernels suite: the operators of EffSegNet base by ATen and by our kernels, and a whole layer
(convolution, instance normalisation, activation; forward and backward) beside stock torch's.

Sizes are those that the network asks for on a workload, cut to `trials.MOST_ELEMENTS`, and configurations
those that it would get there. Kernels are timed only
where they agree with ATen, layers where they agree with stock torch's.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import torch
from torch import Tensor, nn

from effseg import algorithm
from effseg.benchmarking import results, traffic
from effseg.benchmarking.failure import Failure, attempt
from effseg.benchmarking.record import Row
from effseg.benchmarking.registry import NO_GPU, ONLY_COMPILED, Workload
from effseg.benchmarking.timing import ROUNDS, Stopwatch, Times, filled, gpu_seconds, race
from effseg.errors import InputError
from effseg.kernels.choose import choose, uses_aten
from effseg.kernels.config import Problem, Triple
from effseg.kernels.heuristics import heuristic
from effseg.memory.step import DTYPES
from effseg.models.levels import PRESETS
from effseg.modules import ConvNormAct3d
from effseg.tuning.problem_lists import Listed, asked, read

MODEL = "effseg-base"
LEVELS = PRESETS["base"].widths[:4]
"""Channels at full, half, quarter and eighth resolution: below there is hardly any work."""
ONE = (1, 1, 1)
PASSES = ("conv3d_fwd", "conv3d_dgrad", "conv3d_wgrad")
ELEMENTWISE = ("norm_act", "norm_act_backward", "fold", "moments", "upsample", "upsample_transpose")
HEADS = ("head_sums", "head_backward", "head_argmax")
KERNEL = ("aten", "triton")
LAYER = (*KERNEL, "eager", "compile")
FLUSH_BYTES = 2**30
"""Written before each call: more than a cache holds, and while it lasts the host gets ahead of the GPU, so
that it does not count how long a launch takes."""

Results = tuple[Tensor, ...]
Run = Callable[[], Results]


@dataclass(frozen=True)
class Operator:
    """name: with its shape; size: (D, H, W) of what it runs on; contenders: their names; make: what runs
    each of them, or why it is not to be timed."""

    name: str
    size: Triple
    bytes_moved: int
    macs: int
    contenders: tuple[str, ...]
    make: Callable[[], dict[str, Run | Failure]]

    def blank(self, contender: str, dtype: str) -> Row:
        """Its row without times."""
        size, task = "x".join(map(str, self.size)), self.name.split()[0]
        return Row(
            "kernels", f"{self.name}/{contender}", size, dtype, task,
            voxels=math.prod(self.size), bytes_moved=self.bytes_moved, macs=self.macs,
        )  # fmt: skip


def rows(
    workload: Workload,
    dtype: str,
    device: torch.device,
    *,
    compiled: bool = True,
    names: Collection[str] | None = None,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    show: Callable[[Row], object] = lambda row: None,
    stopwatch: Stopwatch | None = None,
) -> list[Row]:
    """Of every operator, one for each contender; compiled: whether layers are also run by torch.compile;
    names: only of these operators.

    seconds: about how long to measure; three rounds of each operator are not cut short. show: called with
    each row. stopwatch: as in `race`. Needs Triton, though not a GPU.
    """
    if stopwatch is None and device.type == "cuda":
        stopwatch = partial(gpu_seconds, device, flush_bytes=FLUSH_BYTES)
    deadline = time.monotonic() + seconds
    known = operators(workload, dtype, device, compiled)
    todo = [operator for operator in known if names is None or operator.name in names]
    found = []
    for i, operator in enumerate(todo):
        left = max(0.0, deadline - time.monotonic()) / (len(todo) - i)
        times = _raced(
            operator, partial(race, device=device, rounds=rounds, seconds=left, stopwatch=stopwatch)
        )
        for name in operator.contenders:
            found.append(filled(operator.blank(name, dtype), times[name]))
            show(found[-1])
    return found


def _raced(
    operator: Operator, race: Callable[..., dict[str, Times | Failure]]
) -> Mapping[str, Times | Failure]:
    made = attempt(operator.make)
    if isinstance(made, Failure):  # nothing to check against
        return dict.fromkeys(operator.contenders, made)
    failures: dict[str, Times | Failure] = {n: run for n, run in made.items() if isinstance(run, Failure)}
    return failures | race({name: run for name, run in made.items() if name not in failures})


def operators(
    workload: Workload, dtype: str, device: torch.device, compiled: bool = True, heads_only: bool = False
) -> list[Operator]:
    """heads_only: the other operators are the same for any number of classes."""
    found = [
        *(_operator(problem, device) for problem in problems(workload, dtype, device)),
        *(
            _layer(channels, _halved(workload.volume, level), dtype, device, compiled)
            for level, channels in enumerate(LEVELS)
        ),
    ]
    return [operator for operator in found if operator.name.startswith("head") or not heads_only]


def _halved(size: Triple, times: int) -> Triple:
    d, h, w = (-(-n // 2**times) for n in size)
    return d, h, w


# Operators of the network


def problems(workload: Workload, dtype: str, device: torch.device) -> list[Problem]:
    """As `effseg.kernels.config` describes them: of what the network asks for on the workload, by operator
    and channels, that which takes longest in a step."""
    from effseg.kernels import device as gpus
    from effseg.kernels import launch

    needed = _asked(workload, dtype, launch.architecture(device))
    width = LEVELS[0]
    shapes = [(op, width, width, (3, 3, 3)) for width in LEVELS for op in PASSES]
    shapes += [(op, width, width, (1, 1, 1)) for op in ELEMENTWISE]
    shapes += [(op, width, workload.classes, (1, 1, 1)) for op in HEADS]
    found = [next(p for p in needed if _is_of(p, dtype, *shape)) for shape in shapes]
    if device.type != "cuda":
        return found
    gpu, multiprocessors = gpus.gpu(device), gpus.multiprocessors(device)
    return [replace(problem, gpu=gpu, multiprocessors=multiprocessors) for problem in found]


@lru_cache(maxsize=16)
def _asked(workload: Workload, dtype: str, architecture: str) -> list[Problem]:
    """As a committed list says, for what a GPU should not wait; else as a step on fake tensors does."""
    from effseg.tuning import autotune

    known = asked(_committed(), Listed(MODEL, workload.volume, dtype, workload.classes, architecture))
    if known is not None:
        return known
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a network that is not trained
        return autotune.problems(MODEL, workload.volume, [dtype], workload.classes, architecture)


@cache
def _committed() -> dict[Listed, list[Problem]]:
    """None outside a checkout."""
    try:
        return read(results.FOLDER.with_name("problems.json"))
    except (InputError, OSError):
        return {}


def _is_of(problem: Problem, dtype: str, op: str, channels: int, out_channels: int, kernel: Triple) -> bool:
    found = problem.op, problem.in_channels, problem.out_channels, problem.kernel
    return found == (op, channels, out_channels, kernel) and (problem.dtype, problem.stride) == (dtype, ONE)


def shape(problem: Problem) -> str:
    """As in "16->16 3x3x3", or "C16" where channels stay and there is no kernel."""
    if problem.op.startswith("head"):
        return f"{problem.in_channels}->{problem.out_channels}"
    if problem.op.startswith("conv3d"):
        return f"{problem.in_channels}->{problem.out_channels} {'x'.join(map(str, problem.kernel))}"
    return f"C{problem.in_channels}"


def _operator(problem: Problem, device: torch.device) -> Operator:
    from effseg.tuning import trials

    measured = trials.cropped(problem)
    return Operator(
        f"{problem.op} {shape(problem)}",
        measured.size,
        traffic.bytes_moved(measured),
        traffic.macs(measured),
        KERNEL,
        partial(_kernel_and_aten, problem, device),
    )


@torch.no_grad()
def _kernel_and_aten(problem: Problem, device: torch.device) -> dict[str, Run | Failure]:
    """The kernel as it is chosen, or as it would be were the problem not left to ATen."""
    from effseg.tuning import trials

    run = trials.trial(problem, device)
    aten = torch.no_grad()(run.aten)
    if device.type != "cuda":
        return {"aten": aten, "triton": Failure("skipped", NO_GPU)}
    chosen = choose(problem)
    chosen = heuristic(problem) if uses_aten(chosen) else chosen
    kernel = torch.no_grad()(partial(run.kernel, chosen))
    return {"aten": aten, "triton": _checked(kernel, aten(), problem.dtype)}


def _checked(run: Run, expected: Results, dtype: str) -> Run | Failure:
    """The function, unless it gives something else."""
    from effseg.tuning import search

    wrong = attempt(lambda: search.disagreement(run(), expected, dtype))
    if isinstance(wrong, Failure):
        return wrong
    return Failure("wrong", wrong) if wrong else run


# A layer


def _layer(channels: int, size: Triple, dtype: str, device: torch.device, compiled: bool) -> Operator:
    from effseg.kernels import launch
    from effseg.tuning import trials

    like = torch.empty(0, channels, *size, dtype=DTYPES[dtype], device=device)
    size = trials.cropped(launch.problem("conv3d_fwd", like, size=size)).size
    return Operator(
        f"layer {channels}->{channels} 3x3x3",
        size,
        traffic.layer_bytes(channels, size, dtype),
        traffic.layer_macs(channels, size),
        LAYER,
        partial(_layers, channels, size, dtype, device, compiled),
    )


def _layers(
    channels: int, size: Triple, dtype: str, device: torch.device, compiled: bool
) -> dict[str, Run | Failure]:
    """All with the same weights."""
    unit = ConvNormAct3d(channels, channels).to(device)
    stock = nn.Sequential(unit.conv, unit.norm, nn.LeakyReLU(unit.negative_slope))
    stock.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    features = torch.randn(2, 1, channels, *size, device=device, dtype=DTYPES[dtype])
    x, grad = (t.contiguous(memory_format=torch.channels_last_3d) for t in features)
    x.requires_grad_()

    def run(module: Callable[[Tensor], Tensor], name: str) -> Results:
        low = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")
        with low, algorithm(name):
            y = module(x)
        dx, dw = torch.autograd.grad(y, (x, unit.conv.weight), grad)
        return y.detach(), dx, dw

    eager = partial(run, stock, "auto")
    expected = eager()
    found: dict[str, Run | Failure] = {
        "aten": _checked(partial(run, unit, "aten"), expected, dtype),
        "triton": Failure("skipped", NO_GPU),
        "eager": eager,
        "compile": Failure("skipped", ONLY_COMPILED),
    }
    if device.type == "cuda":
        found["triton"] = _checked(partial(run, unit, "triton"), expected, dtype)
    if compiled:
        torch.compiler.reset()  # else an earlier layer's shapes would make this one's dynamic
        found["compile"] = _checked(partial(run, torch.compile(stock), "auto"), expected, dtype)
    return found
