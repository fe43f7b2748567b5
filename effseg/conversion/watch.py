"""What a converted network does, told to whoever watches: the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from effseg.common.settings import Setting


class Watcher(Protocol):
    def took(self, what: str) -> None:
        """An operator was taken over."""

    def left(self, what: str) -> None:
        """Something needed the values of a tensor that was not stored."""


_watcher: Setting[Watcher | None] = Setting("effseg_watcher", None, lasting=False)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    with _watcher.set(watcher):
        yield


def took(what: str) -> None:
    watcher = _watcher.get()
    if watcher is not None:
        watcher.took(what)


def materialised(func: Any) -> None:
    """A function of torch that no rule takes got ordinary tensors."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher.left(getattr(func, "__name__", str(func)))
