"""Where a converted network meets code that is not its own: inputs, outputs, hooks, in-place operators."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from effseg.conversion import mutation
from effseg.conversion.lazy import LazyTensor, lazy
from effseg.conversion.surroundings import Surroundings
from effseg.expressions.layers import plain
from effseg.parallel.door import whole_rows
from effseg.parallel.partition import current

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NO_TRACE = (
    "{} of a converted network: expected eager torch, of which conversion makes its own operators; "
    "effseg.restore(network) gives back the network, with the same weights, for that"
)


def refuse_tracing() -> None:
    """Raise `RuntimeError` in what records or transforms a network's operators."""
    is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
    for name, active in (
        ("torch.jit.trace", torch.jit.is_tracing()),  # type: ignore[attr-defined]
        ("torch.export", is_exporting()),
        ("forward-mode differentiation", forward_ad._current_level >= 0),
        ("torch.func (vmap, grad, jvp)", torch._C._are_functorch_transforms_active()),
    ):
        if active:
            raise RuntimeError(NO_TRACE.format(name))


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with every tensor inside of it replaced, in dataclasses and kinds of mappings, too."""
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        record = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(record, field.name, mapped(function, getattr(value, field.name)))
        return record
    if isinstance(value, Mapping) and hasattr(value, "__setitem__"):
        changed: Any = copy.copy(value)
        for key, item in value.items():
            changed[key] = mapped(function, item)
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(mapped(function, item) for item in value)
    return tree_map(function, value) if tree_leaves(value) != [value] else value


class Carrier:
    """What an input's own class of tensor (MONAI's MetaTensor) says of the network's outputs."""

    def __init__(self, inputs: Any) -> None:
        found = (x for x in tree_leaves(inputs) if isinstance(x, Tensor) and is_subclass(x))
        self._first: Any = next(found, None)

    def carried(self, output: Tensor) -> Tensor:
        """`output` as an operator on that input would give it."""
        if self._first is None or isinstance(output, LazyTensor):
            return output
        kind = type(self._first)
        result: Tensor = kind.__torch_function__(lambda _: output, (kind,), (self._first,), {})
        return result


def is_subclass(x: Tensor) -> bool:
    """Whether it is of a class with a function protocol of its own, and memory."""
    kind = type(x)
    own_functions = kind.__torch_function__ is not torch._C._disabled_torch_function_impl
    return kind not in (Tensor, nn.Parameter, LazyTensor) and own_functions


def entering(x: Tensor) -> Any:
    """An input as the network's operators see it; where its volume is split, of the shape of the whole."""
    if current() is not None and not isinstance(x, LazyTensor) and x.dim() == 5 and x.is_floating_point():
        x = x.as_subclass(Tensor)
        return LazyTensor(plain(x, rows=whole_rows(x)))
    return lazy(x.as_subclass(Tensor) if is_subclass(x) else x)


class Noticing(TorchFunctionMode):
    """In a converted network's forward: ordinary tensors become lazy where an operator knows those, and
    what is recorded runs before its memory changes.

    In checkpoints of the network's own they stay as they are: this mode is not there when those run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._around = Surroundings()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mutation.before([t for t in mutation.written(func, args, kwargs) if not isinstance(t, LazyTensor)])
        if func in LazyTensor.handlers and args and not self._around.are_outside():
            first = [lazy(x) for x in args[0]] if isinstance(args[0], list | tuple) else lazy(args[0])
            args = (first, *args[1:])
        return func(*args, **kwargs)


@contextmanager
def real_at_hooks(network: nn.Module) -> Iterator[None]:
    """Inside, hooks of the network's modules get ordinary tensors, which the network goes on with."""
    handles = []
    for module in network.modules():
        if module is not network and _is_hooked(module):
            handles.append(module.register_forward_pre_hook(_real_inputs, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(_real_outputs, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_hooked(module: nn.Module) -> bool:
    """By others than torch, whose spectral norm, weight norm and pruning look at weights alone."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    return not all(type(hook).__module__.startswith("torch.nn.utils") for hook in hooks)


def _real_inputs(_module: nn.Module, args: Any, kwargs: Any) -> Any:
    return mapped(ordinary, (args, kwargs))


def _real_outputs(_module: nn.Module, _args: Any, output: Any) -> Any:
    return mapped(ordinary, output)


def ordinary(x: Tensor) -> Tensor:
    """Stored as torch would have it, for code that is not the network's."""
    return x.laid_out_for_others() if isinstance(x, LazyTensor) else x
