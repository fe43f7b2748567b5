"""What a lazy tensor's values may be: stored, deferred, or a convolution that has not run (in `stream` with
what follows it)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg import functional
from effseg.common.formats import accumulation_dtype
from effseg.conversion import streamed
from effseg.conversion.outputs import convolve
from effseg.conversion.streamed import Streamed
from effseg.expressions.base import Deferred
from effseg.expressions.joins import Concatenation
from effseg.expressions.layers import Plain, convolved, plain
from effseg.expressions.slabs import Window
from effseg.operators.normalisation import moving_alone
from effseg.parallel.partition import current


class Convolution(NamedTuple):
    """One that has not run yet: what follows decides whether it needs statistics, or runs inside a loss."""

    x: Deferred
    weight: Tensor
    bias: Tensor | None
    window: Window

    @property
    def shape(self) -> tuple[int, ...]:
        n, _, d, h, w = self.x.shape
        return (n, self.weight.shape[0], *self.window.output_size((d, h, w)))

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def is_head(self) -> bool:
        """Whether it is a matrix for every voxel."""
        return self.window == Window((1, 1, 1))

    @property
    def reads_image(self) -> bool:
        """Whether it is to be made again wherever it is used: see `effseg.conversion.streamed`."""
        gives, reads = self.weight.shape[:2]
        return streamed.reads_image(self.x, reads, gives)

    def deferred(self) -> Deferred:
        """Not stored, as in `reads_image`."""
        like = self.weight.new_empty(self.shape[:2], dtype=accumulation_dtype(self.dtype))
        return convolved(self.x, self.weight, self.window, moving_alone(self.bias, like), 1.0)


Value = Tensor | Deferred | Convolution | Streamed
Recipe = Callable[[Sequence[Tensor]], Value]


def stored_as(tensor: Tensor, rows: int) -> Value:
    """A stored tensor as a value: where its volume is split, with the number of rows of the whole."""
    return tensor if current() is None else plain(tensor, rows=rows)


def operands(value: Value) -> tuple[Tensor, ...]:
    """The tensors that it is made of, which gradients reach."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, Deferred):
        return value.tensors
    if isinstance(value, Streamed):
        return streamed.operands(value)
    parameters = (value.weight,) if value.bias is None else (value.weight, value.bias)
    return (*value.x.tensors, *parameters)


def recipe(value: Value) -> Recipe:
    """How it is made of `operands`, or of other tensors in their place; the recipe itself holds none."""
    if isinstance(value, Tensor):
        return lambda tensors: tensors[0]
    if isinstance(value, Deferred):
        spec = value.spec
        return lambda tensors: Deferred(spec, tuple(tensors))
    if isinstance(value, Streamed):
        return streamed.recipe(value)
    spec, window, count, has_bias = value.x.spec, value.window, len(value.x.tensors), value.bias is not None

    def convolution(tensors: Sequence[Tensor]) -> Convolution:
        bias = tensors[-1] if has_bias else None
        return Convolution(Deferred(spec, tuple(tensors[:count])), tensors[count], bias, window)

    return convolution


def constant(value: Value) -> Value:
    """The same values without a gradient; memory is shared."""
    return recipe(value)([t.detach() for t in operands(value)])


def computed(value: Value) -> Tensor:
    """Stored. Nothing in here is for a converted network to see."""
    with torch._C.DisableTorchFunction():
        if isinstance(value, Deferred) and current() is not None and _is_plain(value):
            return value.tensors[0]
        if isinstance(value, Deferred) and _joins_stored(value):
            return torch.cat([t.to(value.dtype) for t in value.tensors], 1)  # which keeps none of them
        if isinstance(value, Deferred):
            return functional.materialise(value)
        if isinstance(value, Convolution):
            return convolve(value.x, value.weight, value.bias, value.window, statistics=False)[0]
        if isinstance(value, Streamed):
            return value.computed()
        return value


def _is_plain(value: Deferred) -> bool:
    return isinstance(value.spec, Plain) and value.dtype == value.tensors[0].dtype


def _joins_stored(value: Deferred) -> bool:
    spec = value.spec
    return isinstance(spec, Concatenation) and all(isinstance(part, Plain) for part in spec.parts)
