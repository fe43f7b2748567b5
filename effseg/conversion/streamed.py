"""What a converted network in `stream` does not store: the layers next to the image and next to the loss.

A convolution that reads the image is made again where its output is used: an ordinary deferred expression.
The last convolution is made by the loss: its norm, activation and head are only noted down, as the values
below, and `effseg.operators.tail` runs all of it slab by slab. Any other use stores the convolution's output,
as other modes do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from effseg import functional, operators
from effseg.common.settings import Setting
from effseg.conversion.outputs import convolve
from effseg.expressions.base import Deferred
from effseg.expressions.layers import Plain, raw
from effseg.expressions.slabs import Window
from effseg.operators.normalisation import layer_terms

# A convolution of so few channels that its arithmetic is small beside that of what reads its output.
LEAST_WIDENING = 4


Place = tuple[int, int]


def place(weight: Tensor) -> Place:
    """Where it is in memory: the same for what is detached of it."""
    return weight.untyped_storage()._cdata, int(weight.storage_offset())


@dataclass(frozen=True)
class Streaming:
    """lasts: `place` of the weights of convolutions that the loss makes; None: all, to find out which it
    could; heads, stored: of convolutions that got a head, and that had to be stored."""

    lasts: frozenset[Place] | None
    heads: list[Place] = field(default_factory=list)
    stored: set[Place] = field(default_factory=set)

    def includes(self, weight: Tensor) -> bool:
        if self.lasts is None:
            return True
        return torch.is_grad_enabled() and place(weight) in self.lasts


streaming: Setting[Streaming | None] = Setting("effseg_streaming", None)


class Summed(NamedTuple):
    """conv(x, weight) + bias + addend, the last convolution's."""

    x: Deferred
    weight: Tensor
    bias: Tensor | None
    window: Window
    addend: Deferred

    @property
    def shape(self) -> tuple[int, ...]:
        return self.addend.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def computed(self) -> Tensor:
        y, _, _ = convolve(self.x, self.weight, self.bias, self.window, statistics=False)
        return y.add_(functional.materialise(self.addend))


class Layer(NamedTuple):
    """The last convolution, its norm and its activation. tail: with statistics."""

    tail: operators.Tail

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tail.x.shape[0], self.tail.weight.shape[0], *self.tail.x.shape[2:])

    @property
    def dtype(self) -> torch.dtype:
        return self.tail.x.dtype

    @property
    def device(self) -> torch.device:
        return self.tail.weight.device

    def deferred(self) -> Deferred:
        """The layer's value, made of the convolution's output, which is stored."""
        now, tail = streaming.get(), self.tail
        if now is not None:
            now.stored.add(place(tail.weight))
        if tail.addend is None:
            y, mean, var = convolve(tail.x, tail.weight, None, tail.window, statistics=True)
        else:
            y = Summed(tail.x, tail.weight, None, tail.window, tail.addend).computed()
            mean, var = operators.statistics(y)
        assert mean is not None
        assert var is not None
        norm = layer_terms(tail.how, tail.running, mean, var, tail.gamma, tail.beta, tail.offset)
        return raw(y, norm, tail.slope)

    def computed(self) -> Tensor:
        return functional.materialise(self.deferred())


class Logits(NamedTuple):
    """The head of the last convolution."""

    layer: Layer
    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        n, _, *size = self.layer.shape
        return (n, self.weight.shape[0], *size)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def computed(self) -> Tensor:
        x = self.layer.deferred()
        return convolve(x, self.weight, self.bias, Window((1, 1, 1)), statistics=False)[0]

    def segmentation_loss(self, labels: Tensor, **options: Any) -> Tensor:
        """`effseg.functional.segmentation_loss` of them."""
        return functional.tail_loss(self.layer.tail, labels, self.weight, self.bias, **options)[0]


Streamed = Summed | Layer | Logits


def operands(value: Streamed) -> tuple[Tensor, ...]:
    return tuple(t for t in tree_leaves(value) if isinstance(t, Tensor))


def recipe(value: Streamed) -> Callable[[Sequence[Tensor]], Streamed]:
    """How to make it of other operands; holds none."""
    leaves, tree = tree_flatten(value)
    holes = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    kept = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def remade(tensors: Sequence[Tensor]) -> Streamed:
        filled = list(kept)
        for hole, tensor in zip(holes, tensors, strict=True):
            filled[hole] = tensor
        made: Streamed = tree_unflatten(filled, tree)
        return made

    return remade


def is_last(weight: Tensor, window: Window) -> bool:
    """Whether the loss is to make this convolution."""
    now = streaming.get()
    return now is not None and window.stride == (1, 1, 1) and now.includes(weight)


def has_last(module: nn.Module) -> bool:
    """Whether the loss is to make one of its convolutions."""
    now = streaming.get()
    return now is not None and any(map(now.includes, module.parameters()))


def makes_again() -> bool:
    """Whether what is cheap to make is made again wherever it is used."""
    return streaming.get() is not None and torch.is_grad_enabled()


def reads_image(x: Deferred, reads: int, gives: int) -> bool:
    """Whether a convolution of x, each of whose `gives` channels is made of `reads`, is to be made again
    wherever it is used: x is stored anyway, wants no gradient, and has few channels."""
    if not makes_again() or not isinstance(x.spec, Plain):
        return False
    return not x.tensors[0].requires_grad and LEAST_WIDENING * reads <= gives


def note_head(value: Layer) -> None:
    now = streaming.get()
    if now is not None:
        now.heads.append(place(value.tail.weight))
