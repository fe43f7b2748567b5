"""The seam between operators and the ways to compute them.

An operator (`effseg.nodes`) decides what is saved for backward and knows no arithmetic; an algorithm is a
package with one function per operator and direction (`conv3d_forward`, `conv3d_backward`, ...), all with the
signatures of `effseg.algorithms.aten`. `select` names the one to use for an expression.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

ALGORITHMS = ("aten",)
_forced: ContextVar[str] = ContextVar("effseg_algorithm", default="auto")


@contextmanager
def algorithm(name: str) -> Iterator[None]:
    """Force one algorithm inside a `with` block: "aten" (cuDNN or oneDNN), or "auto" to let effseg choose.

    An operator keeps the algorithm of its forward for its backward. Raises `ValueError` for an unknown name.
    """
    if name not in ("auto", *ALGORITHMS):
        raise ValueError(f"algorithm: expected one of auto, {', '.join(ALGORITHMS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(operator: str) -> ModuleType:
    """The module that holds `operator`'s functions, of the forced algorithm or of the one that suits best."""
    name = _forced.get()
    return importlib.import_module(f"effseg.algorithms.{'aten' if name == 'auto' else name}.{operator}")
