"""What `effseg.convert` took over, and what it left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from effseg.conversion.lazy import LazyTensor
from effseg.conversion.watch import watching
from effseg.memory.predict import fake_copy
from effseg.slabs import abridged

EDGES = (64, 32, 128, 96)
"""Of the images that a network is tried on."""
BYTES = 4


@dataclass(frozen=True)
class ModuleReport:
    """One module's own operators, not those of its children.

    name: as in `named_modules`; kind: its class; taken: what was taken over; left: what was not, and why;
    bytes_saved: of tensors that it no longer keeps for backward, per voxel of the image, in float32.
    """

    name: str
    kind: str
    taken: tuple[str, ...]
    left: tuple[str, ...]
    bytes_saved: float


@dataclass(frozen=True)
class ConversionReport:
    """modules: those with operators that were taken over or left, in the order of the forward pass; shape:
    of the image it was found out on; problem: why it could not be found out, if so."""

    model: str
    modules: tuple[ModuleReport, ...]
    shape: tuple[int, ...] | None
    problem: str | None = None

    @property
    def taken(self) -> tuple[ModuleReport, ...]:
        """Modules of which a normalisation was taken over, without which no memory is saved."""
        return tuple(m for m in self.modules if any("normalisation" in what for what in m.taken))

    @property
    def left(self) -> tuple[ModuleReport, ...]:
        return tuple(m for m in self.modules if m.left)

    @property
    def bytes_saved(self) -> float:
        """Per voxel of the image, in float32."""
        return sum(m.bytes_saved for m in self.modules)

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.model}: could not be examined: {self.problem}"
        size = "x".join(map(str, self.shape or ()))
        lines = [f"{self.model} on {size}: {self.bytes_saved:.0f} bytes per voxel less are kept (float32)"]
        for module in self.modules:
            name = module.name or "the network itself"
            taken = f"taken: {', '.join(module.taken)}" if module.taken else ""
            left = f"left: {'; '.join(module.left)}" if module.left else ""
            saved = f" ({module.bytes_saved:.1f} B/voxel)" if module.bytes_saved else ""
            lines.append(f"  {name} ({module.kind}): {'; '.join(filter(None, (taken, left)))}{saved}")
        return "\n".join(lines)


def examine(model: nn.Module, shape: Sequence[int] | None = None) -> ConversionReport:
    """Run the network on fake tensors, which takes a second and no memory, and look on."""
    kind = type(model).__name__
    first = next((m for m in model.modules() if isinstance(m, nn.Conv3d)), None)
    if first is None:
        return ConversionReport(kind, (), None)
    shapes = [(1, first.in_channels, edge, edge, edge) for edge in EDGES] if shape is None else [tuple(shape)]
    problem = ""
    for tried in shapes:
        try:
            return ConversionReport(kind, tuple(_modules(model, tried)), tried)
        except Exception as error:  # a network may refuse a size in any way
            problem = problem or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ConversionReport(kind, (), shapes[0], problem)


def _modules(model: nn.Module, shape: tuple[int, ...]) -> Iterator[ModuleReport]:
    with FakeTensorMode(allow_non_fake_inputs=True), abridged(), torch.no_grad():
        network = fake_copy(model)
        names = {module: name for name, module in network.named_modules()}
        dtype = next(network.parameters()).dtype
        watcher = _Watcher(network)
        with watching(watcher), watcher.calls():
            network(LazyTensor(torch.empty(shape, dtype=dtype)))
    voxels = shape[0] * math.prod(shape[2:])
    for module, entry in watcher.entries.items():
        yield ModuleReport(
            names.get(module, "?"),
            type(module).__name__,
            tuple(dict.fromkeys(entry.taken)),
            tuple(dict.fromkeys(entry.left)),
            BYTES * entry.elements / voxels,
        )


@dataclass
class _Entry:
    taken: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    elements: int = 0


class _Watcher:
    """Knows in whose `forward` an operator was met."""

    def __init__(self, network: nn.Module) -> None:
        self.stack = [network]
        self.entries: dict[nn.Module, _Entry] = {}

    def took(self, what: str, elements: int) -> None:
        entry = self._entry()
        entry.taken.append(what)
        entry.elements += elements

    def left(self, what: str) -> None:
        module = self.stack[-1]
        known = any(getattr(f, "__name__", "") == what for f in LazyTensor.handlers)
        reason = "not of a kind that is taken over" if known else "not known"
        shown = f" in {module}" if not list(module.children()) else ""
        self._entry().left.append(f"{what}{shown}: {reason}")

    def _entry(self) -> _Entry:
        return self.entries.setdefault(self.stack[-1], _Entry())

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Follow which module is being called."""
        before = register_module_forward_pre_hook(lambda module, _: self.stack.append(module))
        after = register_module_forward_hook(lambda *_: self._leave())
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _leave(self) -> None:
        self.stack.pop()
