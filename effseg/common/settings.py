"""Settings that hold inside a `with` block, and in the backward pass of what was computed there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import Context, ContextVar
from functools import wraps
from typing import Any, Generic, TypeVar, cast

import torch

T = TypeVar("T")
_UNSET: Any = object()
_known: list[Setting[Any]] = []
_lasting: list[Setting[Any]] = []


class Setting(Generic[T]):
    """A context variable that torch.compile can read and that backward passes see as their forward did.

    Dynamo traces no context variable. It reads a copy of its own in every thread, and guards on it: a
    compiled function called under another value is compiled again.

    The autograd engine runs what belongs to a GPU in a thread of its own, which no context variable reaches,
    and a backward pass may begin outside the `with` block of its forward. So every `Function` keeps what was
    set in its forward (`Captured`), and so does whatever is run again or run later.

    lasting: whether backward sees the value of its forward. False for what says how a graph is being built,
    which backward never asks: a pass that is run again sets it as it needs it.
    """

    def __init__(self, name: str, default: T, lasting: bool = True) -> None:
        self.name, self.default, self.lasting = name, default, lasting
        self._variable: ContextVar[T] = ContextVar(name, default=_UNSET)
        self._traced = _Copy(default)
        _known.append(self)
        if lasting:
            _lasting.append(self)

    def get(self) -> T:
        if torch.compiler.is_compiling():
            return cast(T, self._traced.value)
        value = self._variable.get()
        if value is _UNSET:
            caller = _caller_of_backward()
            value = self.default if caller is None else caller.get(self._variable, _UNSET)
        return self.default if value is _UNSET else value

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        before, token = self._traced.value, self._variable.set(value)
        self._traced.value = value
        try:
            yield
        finally:
            self._traced.value = before
            self._variable.reset(token)


class _Copy(threading.local):
    def __init__(self, value: Any) -> None:
        self.value = value


def _caller_of_backward() -> Context | None:
    """In a thread of the autograd engine: the context of whoever called backward, where torch hands it on.

    For what is run again by others, such as a whole network under torch.utils.checkpoint.
    """
    if torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls("context"):
        return None
    return cast("Context | None", torch._C._get_obj_in_tls("context"))


def settings() -> tuple[Setting[Any], ...]:
    """All that exist: a module's are known once it is imported."""
    return tuple(_known)


class Captured:
    """What lasting settings are at one moment."""

    def __init__(self) -> None:
        self._values = {setting: setting.get() for setting in _lasting}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, in any thread, they are so again."""
        with ExitStack() as stack:
            for setting in _lasting:
                value = self._values.get(setting, setting.default)  # one that came with a later import
                if setting.get() is not value:
                    stack.enter_context(setting.set(value))
            yield


class Repeated:
    """A context that can be entered any number of times: made anew for each, for backward passes that are run
    again."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


class Function(torch.autograd.Function):
    """A `torch.autograd.Function` whose backward sees the settings of its forward."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        forward, backward = cls.forward, cls.backward

        @wraps(forward)
        def run(ctx: Any, *args: Any) -> Any:
            ctx.captured = Captured()
            return forward(ctx, *args)

        @wraps(backward)
        def pull(ctx: Any, *grads: Any) -> Any:
            with ctx.captured.restored():
                return backward(ctx, *grads)

        cls.forward, cls.backward = staticmethod(run), staticmethod(pull)  # type: ignore[method-assign]
