"""Finding out what `effseg.convert` takes over of a network, and what that saves, by running it once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from effseg.conversion.boundary import Noticing
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.recompute import blocks_run_again
from effseg.conversion.report import ConversionReport, Kept, ModuleReport, one_line
from effseg.conversion.saved import saving
from effseg.conversion.watch import watching
from effseg.expressions.slabs import abridged
from effseg.memory.fakes import on_fakes
from effseg.memory.predict import fake_copy, quiet_fakes

EDGES = (64, 32, 128, 96)
"""Of the images that a network is tried on."""


def examine(
    model: nn.Module, shape: Sequence[int] | None = None, prepare: Callable[[nn.Module], None] | None = None
) -> ConversionReport:
    """Run the network on fake tensors, which takes a second and no memory, and look on.

    prepare: what makes a network's blocks run again in backward, if they are to.
    """
    kind = type(model).__name__
    first = next((m for m in model.modules() if isinstance(m, nn.Conv3d)), None)
    if first is None:
        return ConversionReport(kind, (), None)
    shapes = [(1, first.in_channels, edge, edge, edge) for edge in EDGES] if shape is None else [tuple(shape)]
    problem, tried = "", set()
    while shapes:
        size = shapes.pop(0)
        tried.add(size)
        watcher = _Watcher()

        try:
            modules, kept = on_fakes(partial(_looked_at, model, size, watcher, prepare))
            return ConversionReport(kind, modules, size, kept=kept)
        except Exception as error:  # a network may refuse a size in any way
            problem = problem or one_line(error)
        channels = size[1] + watcher.channels_missing
        other = (size[0], channels, *size[2:])
        if shape is None and channels > 0 and other not in tried:
            problem, shapes = "", [(1, channels, edge, edge, edge) for edge in EDGES]
    return ConversionReport(kind, (), size, problem)


@contextmanager
def trial(
    fakes: FakeTensorMode, model: nn.Module, shape: tuple[int, ...]
) -> Iterator[tuple[nn.Module, Tensor]]:
    """A copy of the network in training, and an image."""
    with (
        fakes,
        abridged(),
        torch.no_grad(),
        quiet_fakes(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        network = fake_copy(model)
        yield network, torch.empty(shape, dtype=next(network.parameters()).dtype)


def _looked_at(
    model: nn.Module,
    shape: tuple[int, ...],
    watcher: _Watcher,
    prepare: Callable[[nn.Module], None] | None,
    fakes: FakeTensorMode,
) -> tuple[tuple[ModuleReport, ...], Kept]:
    watcher.begin()
    with trial(fakes, model, shape) as (network, image), torch.enable_grad():
        names = {module: name for name, module in network.named_modules()}
        others = [image, *network.parameters(), *network.buffers()]
        with watcher.first_convolution(), saving() as before:
            outputs = network(image)  # in torch, where a size that does not fit costs little
        kept_before = before.nbytes(others)
        if prepare is not None:
            prepare(network)
        watcher.stack.append(network)
        again = blocks_run_again.set(prepare is not None)
        with watching(watcher), watcher.calls(), again, saving() as after, Noticing():
            outputs = network(LazyTensor(image))
        kept = Kept(kept_before, after.nbytes(others))
        del outputs  # with the graphs
    modules = tuple(
        ModuleReport(
            names.get(module, "?"),
            type(module).__name__,
            tuple(dict.fromkeys(entry.taken)),
            tuple(dict.fromkeys(entry.left)),
        )
        for module, entry in watcher.entries.items()
    )
    return modules, kept


@dataclass
class _Entry:
    taken: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class _Watcher:
    """Knows in whose `forward` an operator was met.

    channels_missing: what the first convolution that ran expected more than it got.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was met."""
        self.stack: list[nn.Module] = []
        self.entries: dict[nn.Module, _Entry] = {}
        self.channels_missing = 0
        self._has_met_convolution = False

    def took(self, what: str) -> None:
        self._entry().taken.append(what)

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

    @contextmanager
    def first_convolution(self) -> Iterator[None]:
        hook = register_module_forward_pre_hook(self._look_at_channels)
        try:
            yield
        finally:
            hook.remove()

    def _look_at_channels(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, nn.Conv3d) and args and not self._has_met_convolution:
            self._has_met_convolution = True
            self.channels_missing = module.in_channels - args[0].shape[1]

    def _leave(self) -> None:
        self.stack.pop()
