"""Fake tensors, shapes and types without numbers, for programs that do the same to many of them.

torch's own mode finds out anew what each operator returns: a third of a millisecond, and a step by slabs has
tens of thousands. Here an operator that has met tensors like these before is answered from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from effseg.errors import InputError

_CPU, _META = torch.device("cpu"), torch.device("meta")


class _Fresh(NamedTuple):
    """A tensor of its own memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Unknown(Exception):
    """An argument that says too little, or a result that depends on more than its arguments' shapes."""


T = TypeVar("T")
aten = torch.ops.aten

VIEWS = frozenset({
    aten._unsafe_view.default, aten.alias.default, aten.as_strided.default, aten.detach.default,
    aten.expand.default, aten.permute.default, aten.select.int, aten.slice.Tensor, aten.split.Tensor,
    aten.squeeze.dim, aten.t.default, aten.transpose.int, aten.unbind.int, aten.unsqueeze.default,
    aten.view.default,
})  # fmt: skip
_PLAIN = frozenset({
    aten._log_softmax.default, aten._to_copy.default, aten.add.Tensor, aten.addmm.default,
    aten.cat.default, aten.clone.default,
    aten.constant_pad_nd.default, aten.leaky_relu_backward.default, aten.mm.default, aten.mul.Tensor,
    aten.slice_backward.default,
    aten.stack.default, aten.sub.Tensor, aten.sum.dim_IntList,
})  # fmt: skip
_SAME = "the first argument"
_NONE = "nothing"
_VIEW = "views of arguments"
_HASHED = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


MOST_KNOWN = 2**16
_known: dict[Any, Any] = {}  # by all modes: a key says all that a result depends on


class QuickFakes(FakeTensorMode):
    """A FakeTensorMode on the CPU with the same answers, for each operator and kind of arguments found once.

    C++ takes the tensors' device for "meta", so that it need not ask Python each time; Python sees the CPU.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        if len(_known) > MOST_KNOWN:
            _known.clear()
        self._attributes = vars(FakeTensor(self, torch.empty(0, device="meta"), device=_CPU))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here, and what torch would wrap around each call takes as long as it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == _META:
            kwargs["device"] = _CPU
        found = self.quick(func, args, kwargs)
        if found is not NotImplemented:
            return found
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self._remember(func, args, kwargs, out)
        given = {id(t) for t in tree_leaves((args, kwargs))}
        return tree_map_only(
            FakeTensor, lambda t: t if t.constant is not None or id(t) in given else self._wrapped(t), out
        )

    def quick(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operator returns, NotImplemented where torch must be asked."""
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if func in VIEWS and self._owns(args[0]):
            return self._direct(func, args, kwargs)
        if func is aten._to_copy.default and "device" in kwargs and self._owns(args[0]):
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
            if kwargs.get("dtype") in (None, args[0].dtype) and kwargs.get("memory_format") is None:
                return self._direct(aten.alias.default, args, {})  # it is there
        try:
            key = self._key_of(func, args, kwargs)
        except _Unknown:
            return NotImplemented
        known = _known.get(key, _Unknown)
        if known is _Unknown and func in _PLAIN and "device" not in kwargs:
            out = self._direct(func, args, kwargs)
            _known[key] = self._memory(out)
            return out
        if known is _Unknown:
            return NotImplemented
        if known is _SAME:
            return args[0]
        return self._direct(func, args, kwargs) if known is _VIEW else self._made(known)

    def _direct(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operator returns for tensors on the meta device."""
        with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
            self.in_kernel_invocation = True
            torch._C._set_meta_in_tls_dispatch_include(True)
            try:
                found = func(*args, **kwargs)
            finally:
                self.in_kernel_invocation = False
        if isinstance(found, Tensor):
            return self._wrapped(found)
        return [None if t is None else self._wrapped(t) for t in found]

    def _remember(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        with suppress(_Unknown):
            _known[self._key_of(func, args, kwargs)] = self._described(func, out, args, kwargs)

    def _owns(self, tensor: Any) -> bool:
        return type(tensor) is FakeTensor and tensor.constant is None and tensor.fake_mode is self

    def _key_of(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func, torch.get_default_dtype(), self._key(args), self._key(tuple(kwargs.items()))

    def _key(self, value: Any) -> Any:
        kind = type(value)
        if kind is FakeTensor:
            if not self._owns(value):
                raise _Unknown
            return value.shape, value.stride(), value.dtype
        if kind is tuple or kind is list:
            return tuple(map(self._key, value))
        if kind in _HASHED:
            return kind, value
        raise _Unknown

    def _described(self, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        """What is to be remembered of a result."""
        if torch.Tag.inplace_view in func.tags:
            raise _Unknown
        if len(args) > 0 and out is args[0] and isinstance(out, FakeTensor):
            return _SAME
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        held = {t.untyped_storage()._cdata for t in inputs}
        found = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        shared = [t.untyped_storage()._cdata in held for t in found]
        if found and all(shared) and not any(t is i for t in found for i in inputs):
            return _VIEW
        if any(shared):
            raise _Unknown
        return self._memory(out)

    def _memory(self, out: Any) -> Any:
        if isinstance(out, tuple | list):
            return (list if type(out) is list else tuple)(map(self._memory, out))
        if out is None:
            return _NONE
        if type(out) is not FakeTensor or out.constant is not None or out.device != _CPU:
            raise _Unknown
        return _Fresh(out.shape, out.stride(), out.dtype)

    def _made(self, known: Any) -> Any:
        if type(known) is _Fresh:
            with torch._C._DisableTorchDispatch():
                shape, stride, dtype = known
                return self._wrapped(aten.empty_strided.default(shape, stride, dtype=dtype, device=_META))
        return None if known is _NONE else type(known)(map(self._made, known))

    def _wrapped(self, elem: Tensor) -> Tensor:
        """As FakeTensor's own constructor does, without its checks."""
        fake = Tensor._make_subclass(FakeTensor, elem, False, device_for_backend_keys=_CPU)
        fake.__dict__.update(self._attributes)
        return fake


def on_fakes(work: Callable[[FakeTensorMode], T]) -> T:
    """What `work` returns for quick fakes, or for torch's own where it cannot do with these, which C++ takes
    for tensors of another device than constants. Raises what it raises for the latter."""
    try:
        return work(QuickFakes())
    except InputError:
        raise
    except Exception:  # a network may refuse them in any way
        return work(FakeTensorMode(allow_non_fake_inputs=True))
