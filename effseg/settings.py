"""Settings that hold inside a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Setting(Generic[T]):
    """A context variable that torch.compile can read.

    Dynamo traces no context variable. It reads a copy in a plain attribute, which knows no threads, and
    guards on it: a compiled function called under another value is compiled again.
    """

    def __init__(self, name: str, default: T) -> None:
        self._variable: ContextVar[T] = ContextVar(name, default=default)
        self._traced = default

    def get(self) -> T:
        return self._traced if torch.compiler.is_compiling() else self._variable.get()

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        before, token = self._traced, self._variable.set(value)
        self._traced = value
        try:
            yield
        finally:
            self._traced = before
            self._variable.reset(token)
