"""What a training step starts on a GPU, listed on fake tensors: launches of kernels and ATen's operators.

Of a sweep's equal slabs a few stand for all, as in `effseg.memory.predict`, and count for as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.step_model.steps import STEPS
from effseg.benchmarking.registry import Contender, contenders
from effseg.common.device import pretending
from effseg.expressions.slabs import Abridgement, abridged
from effseg.kernels.choose import answering
from effseg.kernels.config import ATEN, Config, Problem, Triple
from effseg.kernels.heuristics import by_heuristic
from effseg.kernels.launch import Launch, recording
from effseg.memory.predict import quiet_fakes
from effseg.memory.step import label_dtype_for

CLASSES = 15
NOT_LAUNCHING = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
)
WRITTEN_ONLY = ("copy_", "zero_", "fill_")


@dataclass(frozen=True)
class Operator:
    """ATen's. shape: of its largest tensor; bytes: of distinct tensors, read and written; flops: of its
    products; channels: those that come in and go out, (0, 0) without products."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    flops: int = 0
    channels: tuple[int, int] = (0, 0)


@dataclass
class Step:
    """launches, operators: with how often each happens; views: operators that launch nothing."""

    launches: list[tuple[Launch, int]] = field(default_factory=list)
    operators: dict[Operator, int] = field(default_factory=dict)
    views: int = 0


class _Watch(TorchDispatchMode):
    """Lists ATen's operators, and says how many slabs the launches between them stand for."""

    def __init__(self, step: Step, launches: list[Launch], abridgement: Abridgement) -> None:
        super().__init__()
        self.step, self.launches, self.abridgement = step, launches, abridgement
        self.alike = 1

    def drain(self) -> None:
        """A launch belongs to the slab in which its operands were allocated or cut out, just before."""
        self.step.launches += [(launch, self.alike) for launch in self.launches]
        self.launches.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drain()
        self.alike = self.abridgement.alike
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name in NOT_LAUNCHING or func.namespace == "prim":
            self.step.views += self.alike
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs, out))):
            found = operator(func, args, kwargs or {}, out)
            self.step.operators[found] = self.step.operators.get(found, 0) + self.alike
        return out


def operator(func: Any, args: Any, kwargs: Any, out: Any) -> Operator:
    """Of tensors every argument is read once, every result and what is changed in place written once."""
    name = func._schema.name.removeprefix("aten::")
    changed: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
    written = distinct([*changed, *tree_leaves(out)])
    read = distinct(tree_leaves((args, kwargs)))
    if name in WRITTEN_ONLY:
        read = [t for t in read if not any(t is w for w in changed)]
    tensors = [*read, *written]
    largest = max(tensors, key=Tensor.numel)
    flops, channels = products(name, args, out)
    return Operator(name, tuple(largest.shape), sum(map(nbytes, tensors)), flops, channels)


def distinct(values: list[Any]) -> list[Tensor]:
    found = {}
    for t in values:
        if isinstance(t, Tensor):
            found[t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride()] = t
    return list(found.values())


def nbytes(tensor: Tensor) -> int:
    """Of what is in memory: what is expanded is there once."""
    found = tensor.itemsize
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found *= 1 if stride == 0 and size > 0 else size
    return found


def products(name: str, args: Any, out: Any) -> tuple[int, tuple[int, int]]:
    """(flops, (channels in, channels out)) of a convolution, its gradients or a matrix product."""
    if name in ("convolution", "convolution_backward"):
        backward = name.endswith("backward")
        weight = args[2] if backward else args[1]
        transposed = args[7] if backward else args[6]
        fine, coarse = (args[1], args[0]) if backward else (args[0], out)
        positions = fine if transposed else coarse
        macs = weight.numel() * positions.shape[0] * positions.shape[2:].numel()
        passes = sum(args[10][:2]) if backward else 1
        return 2 * macs * passes, (weight.shape[1], weight.shape[0])
    if name in ("mm", "bmm", "addmm"):
        a, b = args[-2:]
        return 2 * a.numel() * b.shape[-1], (a.shape[-1], b.shape[-1])
    return 0, (0, 0)


@contextmanager
def _chosen(route: str, multiprocessors: int) -> Iterator[None]:
    def answer(problem: Problem) -> Config:
        if route == "mixed" and problem.op.startswith("conv3d"):
            return Config(ATEN)
        return by_heuristic(replace(problem, multiprocessors=multiprocessors))

    with answering(answer):
        yield


def contender_of(name: str, route: str) -> Contender:
    return contenders()[f"{STEPS[name]}/{'aten' if route == 'aten' else 'triton'}"]


def record(name: str, volume: Triple, route: str, architecture: str, multiprocessors: int) -> Step:
    """Forward, loss, backward and AdamW of one of STEPS, in bf16, by one of ROUTES, with the configurations
    that the heuristics choose."""
    contender = contender_of(name, route)
    step = Step()
    with ExitStack() as stack:
        for context in (FakeTensorMode(allow_non_fake_inputs=True), quiet_fakes(), pretending("cuda")):
            stack.enter_context(context)
        abridgement = stack.enter_context(abridged())
        launches = stack.enter_context(recording(architecture))
        stack.enter_context(_chosen(route, multiprocessors))
        network = contender.make(CLASSES).train()
        # As torch does by itself for parameters on a GPU.
        optimizer = torch.optim.AdamW(network.parameters(), foreach=True)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # its state exists, as in every step but the first
        optimizer.zero_grad(set_to_none=True)
        image = torch.empty(1, 1, *volume)
        labels = torch.empty(1, *volume, dtype=label_dtype_for(network, None))
        watch = stack.enter_context(_Watch(step, launches, abridgement))
        contender.step(network, image, labels, "bf16")
        optimizer.step()
        watch.drain()
    return step
