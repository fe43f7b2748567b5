"""What torch does not tell of tensors: those that a network holds, and who holds their memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
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


def storage_use_count(tensor: Tensor) -> int:
    """How many tensors and other holders the memory of a tensor has."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count
