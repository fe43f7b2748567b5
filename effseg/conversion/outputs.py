"""Convolutions of a block that is run again in backward: those whose outputs are kept do not run twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from effseg import operators
from effseg.common.settings import Setting
from effseg.expressions.base import Deferred
from effseg.expressions.slabs import Window
from effseg.operators.conv3d import Outputs


class KeptOutputs:
    """Outputs of a block's convolutions in the order of their calls; None for those that are not kept."""

    def __init__(self) -> None:
        self.outputs: list[Outputs | None] = []
        self._calls = 0
        self._replays = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """For one pass over the block."""
        self._calls = 0
        with _kept.set(self):
            yield

    def next(self) -> Outputs | None:
        """A second pass takes what was kept, which then lives as long as its graph: a third one, over a
        graph that was retained, runs the convolution."""
        self._calls += 1
        if not self._replays:
            return None
        found, self.outputs[self._calls - 1] = self.outputs[self._calls - 1], None
        return found

    def add(self, found: Outputs) -> None:
        if not self._replays:
            self.outputs.append(found)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """After the first pass: forget outputs that are not among these, which live on anyway."""
        alive = {_storage(t) for t in tensors}
        # One without statistics may have become a sum.
        self.outputs = [
            detached(found) if found and _storage(found[0]) in alive and found[1] is not None else None
            for found in self.outputs
        ]
        self._replays = True


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def detached(found: Outputs) -> Outputs:
    y, mean, var = found
    return y.detach(), mean if mean is None else mean.detach(), var if var is None else var.detach()


_kept: Setting[KeptOutputs | None] = Setting("effseg_kept_outputs", None, lasting=False)


def current() -> KeptOutputs | None:
    """Of the block that is being run."""
    return _kept.get()


@contextmanager
def belonging_to(kept: KeptOutputs | None) -> Iterator[None]:
    """Inside, convolutions count as those of that block if it is being run, else of none."""
    with _kept.set(kept if _kept.get() is kept else None):
        yield


def convolve(x: Deferred, weight: Tensor, bias: Tensor | None, window: Window, statistics: bool) -> Outputs:
    """y and, with `statistics`, its mean and variance."""
    kept = _kept.get()
    known = None if kept is None else kept.next()
    found: Outputs = operators.conv3d(x, weight, bias, window, statistics, known=known)
    if kept is not None:
        kept.add(found)
    return found
