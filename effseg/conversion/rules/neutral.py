"""What changes nothing, and what is asked of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effseg.conversion.lazy import LazyTensor, real
from effseg.conversion.rules.registry import rule
from effseg.expressions.joins import padded
from effseg.parallel.partition import current


@rule(F.dropout, F.dropout3d)
def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """One that drops nothing gives the tensor itself, as torch's does."""
    return NotImplemented if training and p else input


@rule(F.pad)
def pad(input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Of nothing; a copy, as torch's is. Where the volume is split, of voxels repeated at the end, too."""
    if any(pad) and mode == "replicate" and current() is not None and isinstance(input, LazyTensor):
        w, h, d = (list(zip(pad[0::2], pad[1::2], strict=True)) + [(0, 0)] * 3)[:3]
        if len(pad) <= 6 and not (w[0] or h[0] or d[0]) and min(pad) >= 0:
            return LazyTensor(padded(input.deferred(input.dtype), (d[1], h[1], w[1])))
    if any(pad) or not isinstance(input, LazyTensor):
        return NotImplemented
    return LazyTensor(input.lent(input.dtype) if isinstance(input.value, Tensor) else input.taken())


@rule(Tensor.contiguous)
def contiguous(input: Any, memory_format: Any = torch.contiguous_format) -> Any:
    """Memory is channels last, whatever is asked for, and what depends on it gets another layout. A copy
    where torch would make one."""
    if memory_format not in (torch.contiguous_format, torch.channels_last_3d):
        return NotImplemented
    return input if input.is_contiguous() else input.clone(memory_format=memory_format)


@rule(Tensor.to)
def to(input: Any, *args: Any, **kwargs: Any) -> Any:
    """Of the type and on the device that it has, or that another tensor has."""
    given = [*args, *(kwargs.get(name) for name in ("dtype", "device"))]
    wanted: list[Any] = []
    for one in given:
        wanted += [one.dtype, one.device] if isinstance(one, Tensor) else [one]
    others = set(kwargs) - {"dtype", "device", "non_blocking", "memory_format"}
    known = (input.dtype, input.device, str(input.device), input.device.type, None, False)
    return NotImplemented if others or any(all(w != k for k in known) for w in wanted) else input


@rule(Tensor.float)
def float_(input: Any, memory_format: Any = None) -> Any:
    return input if input.dtype == torch.float32 else NotImplemented


@rule(Tensor.__getitem__)
def getitem(input: Any, index: Any) -> Any:
    """Crops that leave everything."""
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(input, LazyTensor) or not all(p is Ellipsis or isinstance(p, slice) for p in parts):
        return NotImplemented
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts = (*parts[:at], *[slice(None)] * (input.dim() - len(parts) + 1), *parts[at + 1 :])
    whole = all(p.indices(n) == (0, n, 1) for p, n in zip(parts, input.shape, strict=False))
    return input if whole else NotImplemented


@rule(vars(torch._C.TensorBase)["grad_fn"].__get__)
def grad_fn(input: LazyTensor) -> Any:
    """Of stored values, or what code that does not know lazy tensors has put in its place."""
    return input.foreign_node or NotImplemented


@rule(Tensor.is_leaf.__get__)  # type: ignore[attr-defined]
def is_leaf(input: LazyTensor) -> bool:
    return bool(real(input).is_leaf) if isinstance(input.value, Tensor) else not input.requires_grad
