"""What of torch's state an operator ran in: one that is recorded runs in it too, whenever that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from effseg.conversion import outputs
from effseg.settings import Captured

Hooks = tuple[Any, Any] | None


class Surroundings:
    """Grad mode, inference mode, this package's settings, the block that is being run, and the hooks of saved
    tensors (those of torch.utils.checkpoint and save_on_cpu) of one moment."""

    def __init__(self) -> None:
        self._modes = _modes()
        self._hooks = _innermost_hooks()
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
        if self._hooks == _innermost_hooks():
            return False
        with _without_hooks_after(self._hooks) as found:
            return found

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
            _without_hooks_after(self._hooks),
            self.settings(),
        ):
            yield


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _innermost_hooks() -> Hooks:
    found: Hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return found


@contextmanager
def _without_hooks_after(last: Hooks) -> Iterator[bool]:
    """Inside, `last` are the innermost hooks of saved tensors; where it is not one of them, all stay."""
    removed = []
    while (top := _innermost_hooks()) is not None and top != last:
        removed.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    found = top == last
    if not found:
        _push(removed)
    try:
        yield found
    finally:
        if found:
            _push(removed)


def _push(hooks: list[Any]) -> None:
    for pack, unpack in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
