"""How rules are made known, and what several need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from effseg.conversion.lazy import LazyTensor
from effseg.conversion.streamed import Logits
from effseg.conversion.values import Convolution, Value
from effseg.expressions.slabs import Window

Triple = tuple[int, int, int]
IDENTITY = 1.0
"""The slope of no activation."""


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Take these functions over. Torch knows more names of arguments than a handler (axis for dim, x for
    input, as numpy does) and other orders of old: a call that a handler does not fit is left to torch."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(handler)

        def fitting(*args: Any, **kwargs: Any) -> Any:
            try:
                signature.bind(*args, **kwargs)
            except TypeError:
                return NotImplemented
            return handler(*args, **kwargs)

        LazyTensor.handlers.update(dict.fromkeys(functions, fitting))
        return handler

    return register


def result(input: Tensor, value: Value, inplace: bool) -> LazyTensor:
    """What an operator gives, in place or not."""
    assert isinstance(input, LazyTensor)
    return input.become(value) if inplace else LazyTensor(value)


def unfinished(input: LazyTensor) -> Value:
    """Its value, for a rule that goes on from a convolution: then that was no head."""
    value = input.value
    if isinstance(value, Logits):
        with input.surroundings():
            x = value.layer.deferred()
        value = Convolution(x, value.weight, value.bias, Window((1, 1, 1)))
        input.settle(value)
    return value


def may_change(input: Tensor, inplace: bool) -> bool:
    """Whether an operator may work in place by changing what a lazy tensor is. Stored memory has other
    readers, and another grad mode keeps the graph as it is: torch's own operator does that."""
    return not inplace or (
        isinstance(input, LazyTensor) and input.records and not isinstance(input.value, Tensor)
    )


def triple(value: Any) -> Triple:
    if isinstance(value, Sequence):
        d, h, w = value if len(value) == 3 else (value[0],) * 3
        return int(d), int(h), int(w)
    return (int(value),) * 3
