"""What of torch's state an operator ran in: one that is recorded runs in it too, whenever that is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch

from effseg.common.settings import Captured
from effseg.conversion import outputs

Hooks = tuple[tuple[Any, Any], ...]
"""Of saved tensors: pairs of pack and unpack, the innermost last."""


class Surroundings:
    """Grad mode, inference mode, this package's settings, the block that is being run, and the hooks of saved
    tensors (those of torch.utils.checkpoint and save_on_cpu) of one moment."""

    def __init__(self) -> None:
        self._modes = _modes()
        self._hooks = _active_hooks()
        self._settings = Captured()
        self._block = outputs.current()

    @property
    def records(self) -> bool:
        """Whether operators record a graph."""
        return self._modes[0]

    def are_now(self) -> bool:
        """Whether grad mode and inference mode are the same now."""
        return self._modes == _modes()

    def are_outside(self) -> bool:
        """Whether a checkpoint began since, or other hooks of saved tensors: what it saves is its own."""
        active = _active_hooks()
        return len(active) > _common(active, self._hooks)

    @contextmanager
    def settings(self) -> Iterator[None]:
        with self._settings.restored(), outputs.belonging_to(self._block):
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        grad, inference = self._modes
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            _common_hooks(self._hooks),
            self.settings(),
        ):
            yield


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _innermost_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _active_hooks() -> Hooks:
    found: list[tuple[Any, Any]] = []
    while (top := _innermost_hooks()) is not None:
        found.insert(0, top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    _push(found)
    return tuple(found)


def _common(active: Hooks, others: Hooks) -> int:
    """How many hooks are among both, from the outermost on."""
    same = (mine == other for mine, other in zip(active, others, strict=False))
    return sum(takewhile(bool, same))


@contextmanager
def _common_hooks(others: Hooks) -> Iterator[None]:
    """Inside, hooks are those that are among both the active ones and these."""
    active = _active_hooks()
    removed = active[_common(active, others) :]
    for _ in removed:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        _push(removed)


def _push(hooks: Iterable[tuple[Any, Any]]) -> None:
    for pack, unpack in hooks:
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
