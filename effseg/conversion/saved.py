"""What a forward pass saves for backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Saved:
    """A tensor that a node of autograd's graph has saved; lives as long as the node."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Saved:
    """The tensors that a pass has saved and whose nodes are still there."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._all.add(saved)
        return saved

    def nbytes(self, others: Iterable[Tensor] = ()) -> int:
        """Bytes of their memory, each byte once, but for that of `others`, which is there in any case."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self._tensors()}
        for other in others:
            storages.pop(other.untyped_storage()._cdata, None)
        return sum(storages.values())

    def _tensors(self) -> list[Tensor]:
        return [saved.tensor for saved in self._all]


@contextmanager
def saving() -> Iterator[Saved]:
    """Note what is saved inside; a checkpoint's inside is not, for it saves its inputs alone."""
    saved = Saved()
    with saved_tensors_hooks(saved.pack, lambda packed: packed.tensor):
        yield saved
