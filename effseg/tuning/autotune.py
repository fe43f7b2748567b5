"""Configurations by measurement: `effseg tune`.

`problems` lists what a network's training step and segmentation ask `choose`; `tune` climbs, for each
of them, from the heuristic's configuration to faster neighbours, and writes what is fastest of those that
agree with ATen to a tuned file. Only commands and benchmarks import this file: training never measures.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effseg.algorithms import algorithm
from effseg.common.atomic import atomic_path
from effseg.common.device import pretending
from effseg.common.isolation import Loss, isolated
from effseg.errors import InputError
from effseg.expressions.slabs import Window, abridged
from effseg.kernels import heuristics, tuned
from effseg.kernels.choose import answering
from effseg.kernels.config import ATEN, Config, Problem, Triple
from effseg.kernels.launch import architecture, recording
from effseg.memory.predict import peak_training_memory
from effseg.memory.step import DTYPES
from effseg.models.base import SegmentationModel
from effseg.models.registry import build_model
from effseg.tuning.search import MOST_CANDIDATES, Search, Timer, search
from effseg.tuning.timer import cuda_seconds
from effseg.tuning.trials import cropped
from effseg.version import __version__

MEMORY = ("raw", "stream")
SILENCE = 240.0
"""Seconds that a problem may take: of some configurations compiling does."""


@dataclass(frozen=True)
class Machine:
    """What is measured on. gpu: the GPU's name; architecture: as in `config.Problem`."""

    gpu: str
    architecture: str
    device: torch.device
    timer: Timer

    @classmethod
    def here(cls) -> Machine:
        """Raises InputError without a GPU."""
        if not torch.cuda.is_available():
            raise InputError(f"tune: needs an NVIDIA GPU, torch {torch.__version__} finds none")
        device = torch.device("cuda", torch.cuda.current_device())
        timer = partial(cuda_seconds, device)
        return cls(torch.cuda.get_device_name(device), architecture(device), device, timer)

    @property
    def slug(self) -> str:
        return tuned.gpu_slug(self.gpu)


# What is needed


def problems(
    model: str, volume: Triple, dtypes: Sequence[str], classes: int, arch: str, channels: int = 1
) -> list[Problem]:
    """What a training step and a segmentation on a volume ask for, those that take longest first.

    They run on fake tensors in both memory modes, once with convolutions by our kernels and once as if all
    were left to ATen: then activated slabs are made, and asked for, that fused convolutions do without.
    """
    met: dict[str, tuple[float, Problem]] = {}

    def answer(aten: bool, problem: Problem) -> Config:
        name = tuned.key(problem)
        work, largest = met.get(name, (0.0, problem))
        met[name] = (work + _work(problem), max(largest, problem, key=lambda p: p.size))
        by_aten = aten and problem.op.startswith("conv3d")
        return Config(ATEN) if by_aten else heuristics.heuristic(problem)

    def build(memory: str) -> SegmentationModel:
        network = build_model(model, channels, classes)
        return type(network)(**(network.arguments | {"memory": memory}))

    shape = (1, channels, *volume)
    for dtype, memory, aten in product(dtypes, MEMORY, (False, True)):
        with algorithm("triton"), recording(arch), answering(partial(answer, aten)):
            peak_training_memory(partial(build, memory), shape, dtype=dtype, device="cuda")
            autocast = torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32")
            with FakeTensorMode(), pretending("cuda"), abridged(), autocast:
                build(memory).segment(torch.empty(shape))
    # Asked for, but never run: the gradient of an image.
    met = {name: row for name, row in met.items() if not _is_gradient_of(row[1], channels)}
    return [problem for _, problem in sorted(met.values(), key=lambda row: -row[0])]


def _is_gradient_of(problem: Problem, image_channels: int) -> bool:
    return problem.op == "conv3d_dgrad" and problem.in_channels == image_channels


def _work(problem: Problem) -> float:
    """About proportional to the time of a call."""
    voxels = problem.size[0] * problem.size[1] * problem.size[2]
    taps = problem.kernel[0] * problem.kernel[1] * problem.kernel[2]
    return float(voxels * taps * (problem.in_channels + problem.out_channels))


# Tuned files


def versions() -> dict[str, str]:
    return {**tuned.compilers(), "effseg": __version__}


@dataclass
class TunedFile:
    """Entries by `tuned.key`, and what is noted of each: seconds, date and versions."""

    path: Path
    gpu: str
    entries: dict[str, Config] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, gpu: str) -> TunedFile:
        """Empty where there is no file; also where it is corrupt or stale, with a warning."""
        tuned.read_tuned.cache_clear()
        entries = dict(tuned.read_tuned(path))
        rows = json.loads(path.read_text(encoding="utf-8"))["entries"] if entries else {}
        return cls(path, gpu, entries, {name: row.get("measured", {}) for name, row in rows.items()})

    def write(self) -> None:
        document = tuned.tuned_document(self.entries, self.notes, self.gpu)
        with atomic_path(self.path) as temporary:
            temporary.write_text(document, encoding="utf-8")
        tuned.read_tuned.cache_clear()

    def is_current(self, problem: Problem) -> bool:
        """Whether the problem was measured with the versions that are installed."""
        return self._notes(problem).get("versions") == versions()

    def add(self, problem: Problem, found: Search) -> None:
        """The fastest configuration; of a fused convolution's passes the fastest kernel, see `settle`."""
        kernel = found.best_kernel
        best = kernel if kernel and _is_fused(problem) else found.best
        name = tuned.key(problem)
        self.entries[name] = best
        self.notes[name] = {
            **found.measured[best]._asdict(),
            "heuristic": found.seconds(heuristics.heuristic(problem)),
            "kernel": found.seconds(kernel),
            "aten": found.seconds(Config(ATEN)),
            "best_kernel": kernel and asdict(kernel),
            "tried": len(found.measured),
            "dropped": {label(config): reason for config, reason in found.dropped.items()},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
        }

    def settle(self, needed: Sequence[Problem]) -> None:
        """Leave a fused convolution to ATen where that is faster in all, over the passes that were measured.

        `effseg.algorithms.triton` fuses all passes of a convolution or none, and none where one of them is
        left to ATen: so the forward pass's entry decides, and those of its gradients are of kernels.
        """
        for forward in needed:
            kernel = self._notes(forward).get("best_kernel")
            if forward.op != "conv3d_fwd" or not _is_fused(forward) or kernel is None:
                continue
            passes = [p for p in needed if _is_pass_of(p, forward)]
            gain = sum(self._gain(p) for p in passes)
            self.entries[tuned.key(forward)] = Config(ATEN) if gain > 0 else Config(**kernel)

    def _gain(self, problem: Problem) -> float:
        """Seconds that ATen saves over the whole of a problem."""
        notes = self._notes(problem)
        if not (notes.get("kernel") and notes.get("aten")):
            return 0.0
        return (notes["kernel"] - notes["aten"]) * problem.size[0] / cropped(problem).size[0]

    def _notes(self, problem: Problem) -> dict[str, Any]:
        return self.notes.get(tuned.key(problem), {})


def _is_fused(problem: Problem) -> bool:
    return problem.op.startswith("conv3d") and problem.prologue


def _is_pass_of(problem: Problem, forward: Problem) -> bool:
    """Whether it is the forward pass, or a gradient over the whole of its tensors."""
    if not _is_fused(problem):
        return False
    size = problem.size
    if problem.op == "conv3d_dgrad":
        size = Window(problem.kernel, problem.stride).output_size(size)
    return replace(problem, op=forward.op, size=size) == forward


def label(config: Config) -> str:
    """The loop, and every field that is not 0."""
    values = asdict(config)
    loop = values.pop("loop")
    return " ".join([loop, *(f"{name}={value}" for name, value in values.items() if value)])


# All of it


@dataclass
class Outcome:
    """searches: of the problems that were measured, in order; known: how many needed not be; left: how many
    the time limit left; lost: problems whose measuring took its process along, or did not end, and why."""

    file: TunedFile
    searches: dict[Problem, Search] = field(default_factory=dict)
    known: int = 0
    left: int = 0
    lost: dict[Problem, str] = field(default_factory=dict)


def tune(
    needed: Sequence[Problem],
    machine: Machine,
    path: Path,
    *,
    todo: Sequence[Problem] | None = None,
    ops: Sequence[str] = (),
    again: bool = False,
    seconds: float = math.inf,
    most: int = MOST_CANDIDATES,
    clock: Callable[[], float] = time.monotonic,
    show: Callable[[Problem], object] = lambda problem: None,
) -> Outcome:
    """Measure what is needed, of `ops` and of `todo` only if they are given, and write the file after each
    problem.

    Problems that the file has of the same versions are passed over, but for `again`. No problem is begun
    after `seconds`. `show` is called as each is done with.
    """
    outcome = Outcome(TunedFile.read(path, machine.gpu))
    deadline = clock() + seconds
    for problem in needed if todo is None else todo:
        if ops and problem.op not in ops:
            continue
        if not again and outcome.file.is_current(problem):
            outcome.known += 1
        elif clock() >= deadline:
            outcome.left += 1
            continue
        else:
            found = outcome.searches[problem] = search(problem, machine.device, machine.timer, most)
            if found.measured:
                outcome.file.add(problem, found)
                outcome.file.settle(needed)
                outcome.file.write()
        show(problem)
    return outcome


def tune_isolated(
    needed: Sequence[Problem],
    machine: Machine,
    path: Path,
    *,
    ops: Sequence[str] = (),
    again: bool = False,
    seconds: float = math.inf,
    show: Callable[[Problem], object] = lambda problem: None,
) -> Outcome:
    """`tune`, on a GPU in a process of its own: a problem that takes it along, or is not done within SILENCE,
    is lost, and another process goes on after it."""
    if machine.device.type != "cuda":
        return tune(needed, machine, path, ops=ops, again=again, seconds=seconds, show=show)
    rest = [problem for problem in needed if not ops or problem.op in ops]
    total = Outcome(TunedFile(path, machine.gpu))
    deadline = time.monotonic() + seconds

    def tell(message: Problem | Outcome) -> None:
        if isinstance(message, Outcome):
            total.searches |= message.searches
            total.known += message.known
            total.left += message.left
        else:
            rest.remove(message)
            show(message)

    while rest:
        left = deadline - time.monotonic()
        run = partial(_tune_and_tell, needed, list(rest), machine, path, again, left)
        before = len(rest)
        loss: Loss | None = isolated(run, tell, silence=SILENCE)
        if loss is None:
            break
        total.known += before - len(rest)  # what that process has measured is in the file
        problem = rest.pop(0)
        total.lost[problem] = loss.reason
        show(problem)
    total.file = TunedFile.read(path, machine.gpu)
    return total


def _tune_and_tell(
    needed: Sequence[Problem],
    rest: Sequence[Problem],
    machine: Machine,
    path: Path,
    again: bool,
    seconds: float,
    tell: Callable[[Problem | Outcome], object],
) -> None:
    """Every problem as it is done with, then what came of them."""
    tell(tune(needed, machine, path, todo=rest, again=again, seconds=seconds, show=tell))
