"""What an operator makes of a tensor for every slab alike, such as a kernel's layout of a weight."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from torch import Tensor

from effseg.common.settings import Setting

_made: Setting[dict[Hashable, tuple[Tensor, Tensor]] | None] = Setting("effseg_made", None, lasting=False)


@contextmanager
def making_once() -> Iterator[None]:
    """Inside, `made_once` remembers; what it has made is freed at the end."""
    with _made.set({}):
        yield


def made_once(make: Callable[..., Tensor], source: Tensor, *how: Hashable) -> Tensor:
    """make(source, *how), or what it gave before for the same memory.

    The source is kept with it, so that no other tensor comes to lie in its memory. Nobody may write to
    either.
    """
    made = _made.get()
    if made is None:
        return make(source, *how)
    storage = source.untyped_storage()._cdata
    key = (make, how, storage, source.storage_offset(), source.shape, source.stride(), source.dtype)
    if key not in made:
        made[key] = source, make(source, *how)
    return made[key][1]
