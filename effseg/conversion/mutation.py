"""In-place operators: what was recorded and reads their memory runs before they do."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import tree_leaves

IN_PLACE = frozenset(
    f"__{name}__"
    for name in (
        "set", "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior",
        "ixor", "ilshift", "irshift",
    )
)  # fmt: skip


FIRST = ("input", "x", "a", "x1")
"""Torch's names of what a function reads or changes."""


class Recorded(Protocol):
    """Something that reads its operands later."""

    def operands(self) -> tuple[Tensor, ...]: ...
    def read(self) -> Tensor: ...
    def keep_parameters(self) -> None: ...


class _Pending(threading.local):
    """What is recorded and alive in this thread."""

    def __init__(self) -> None:
        self.by_id: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


_pending = _Pending()


def recorded(what: Recorded) -> None:
    _pending.by_id[id(what)] = what


def settled(what: Recorded) -> None:
    _pending.by_id.pop(id(what), None)


def pending() -> list[Recorded]:
    """What is recorded and alive in this thread."""
    return list(_pending.by_id.values())


def before(written: list[Tensor]) -> None:
    """Run what reads the memory of these tensors, which are about to change."""
    if not written or not _pending.by_id:
        return
    changing = {t.untyped_storage()._cdata for t in written}
    for what in pending():
        if any(t.untyped_storage()._cdata in changing for t in what.operands()):
            what.read()


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that this call of one of torch's functions changes."""
    found: list[Any] = []
    name, position = _signature(func)
    works_in_place = position is not None and (
        bool(args[position]) if len(args) > position else bool(kwargs.get("inplace"))
    )
    if name in IN_PLACE or works_in_place or (name.endswith("_") and not name.endswith("__")):
        found += tree_leaves(args[:1] or [kwargs.get(first) for first in FIRST])
    if kwargs.get("out") is not None:
        found += tree_leaves(kwargs["out"])
    return [t for t in found if isinstance(t, Tensor)]


@lru_cache(maxsize=4096)
def _signature(func: Any) -> tuple[str, int | None]:
    """The function's name, and where it takes whether to work in place."""
    name = str(getattr(func, "__name__", ""))
    try:
        parameters: Iterator[str] = iter(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # functions in C++ have names for it
        return name, None
    return name, next((i for i, parameter in enumerate(parameters) if parameter == "inplace"), None)


def versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """How often each one's memory has changed; those of inference mode do not count."""
    return tuple(0 if t.is_inference() else t._version for t in tensors)
