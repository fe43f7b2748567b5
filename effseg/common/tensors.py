"""The tensors that a network holds, registered or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def unregistered(model: nn.Module) -> Iterator[Tensor]:
    """Tensors in modules' plain attributes, such as outputs that a network remembers."""
    registered = {id(t) for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for tensor in _inside(vars(module)):
            if id(tensor) not in registered:
                yield tensor


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _inside(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _inside(item)
