"""What a block was made of before its first pass, for the second one."""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from effseg.common.tensors import unregistered
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.values import operands, recipe

CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
"""Of attributes that are copied: what a pass adds to one is not there in the other."""

Attributes = dict[str, Any]


class State:
    """What a block's modules were when this was made: attributes, mode, hooks, parameters and whether those
    want gradients. Values of tensors are as they are, but for `Buffers`."""

    def __init__(self, block: nn.Module) -> None:
        self._own = [(module, _copied(vars(module))) for module in block.modules()]
        self._wants = [(t, t.requires_grad) for t in (*block.parameters(), *block.buffers())]
        self._unread = {id(t): t for t in unregistered(block)}
        self._loose = bool(self._unread)

    def reading(self) -> AbstractContextManager[Any]:
        """For a pass: see which tensors among the attributes it reads."""
        return _Reading(self._unread) if self._unread else nullcontext()

    def first_pass_is_over(self) -> None:
        """Hold no graph of an earlier pass, which may hold that of one before it, and no tensor that was not
        read, such as one that a module remembers of the last step and replaces in this one."""
        if self._loose:
            self._own = [(module, _changed(self._held, own)) for module, own in self._own]
        self._unread = {}

    def _held(self, x: Any) -> Any:
        return _Unread(x) if id(x) in self._unread else _apart(x)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the modules are so again; what is changed there is as if it had not been."""
        now = [(module, vars(module)) for module, _ in self._own]
        wanted = [(t, t.requires_grad) for t, _ in self._wants]
        try:
            _set([(module, self._as_then(own)) for module, own in self._own], self._wants)
            yield
        finally:
            _set(now, wanted)

    def _as_then(self, own: Attributes) -> Attributes:
        copied = _copied(own)
        return _changed(lambda x: x.now() if isinstance(x, _Unread) else x, copied) if self._loose else copied


def _set(own: Iterable[tuple[nn.Module, Attributes]], wants: Iterable[tuple[Tensor, bool]]) -> None:
    for module, attributes in own:
        object.__setattr__(module, "__dict__", attributes)
    for tensor, want in wants:
        if tensor.requires_grad != want:
            tensor.requires_grad_(want)


def _copied(own: Attributes) -> Attributes:
    return {name: value.copy() if type(value) in CONTAINERS else value for name, value in own.items()}


def _changed(function: Callable[[Any], Any], own: Attributes) -> Attributes:
    """With every tensor changed that is neither a parameter nor a buffer."""
    kept = ("_parameters", "_buffers")
    return {name: value if name in kept else _inside(function, value) for name, value in own.items()}


def _inside(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Tensor | _Unread):
        return function(value)
    if type(value) is tuple:
        return tuple(_inside(function, item) for item in value)
    if type(value) in CONTAINERS and type(value) is not set:
        found = value.copy()
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found[key] = _inside(function, item)
        return found
    return value


def _apart(x: Tensor) -> Tensor:
    """The same without the graph that it was made in."""
    if isinstance(x, LazyTensor):
        value = x.value
        return LazyTensor(recipe(value)([_apart(t) for t in operands(value)]))
    return x if x.grad_fn is None else x.detach().requires_grad_()


class _Unread:
    """A tensor that the first pass did not read, as long as somebody else has it."""

    def __init__(self, x: Tensor) -> None:
        self._there = weakref.ref(x)
        self._gone = torch.empty(x.shape, dtype=x.dtype, device="meta")  # whose values are not read unnoticed

    def now(self) -> Tensor:
        there = self._there()
        return self._gone if there is None else there


class _Reading(TorchFunctionMode):
    """Leaves of tensors, by id, those that no function of torch gets."""

    def __init__(self, tensors: dict[int, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in tree_leaves((args, kwargs)):
            self._tensors.pop(id(argument), None)
        return func(*args, **(kwargs or {}))


class Buffers:
    """A block's buffers as they were before its first pass, where that changed them: running statistics, a
    spectral norm's vectors, counters."""

    def __init__(self, block: nn.Module) -> None:
        self._before = [(buffer, buffer._version, buffer.clone()) for buffer in block.buffers()]

    def first_pass_is_over(self) -> None:
        self._before = [entry for entry in self._before if entry[0]._version != entry[1]]

    @torch.no_grad()
    def exchange(self) -> list[Tensor]:
        """Set them to what they were; returns what they are."""
        after = [buffer.clone() for buffer, _, _ in self._before]
        self.set([before for _, _, before in self._before])
        return after

    @torch.no_grad()
    def set(self, values: list[Tensor]) -> None:
        for (buffer, _, _), value in zip(self._before, values, strict=True):
            buffer.data.copy_(value)  # what the graph has saved of it is not changed for long
