"""Operators that torch.compile does not look into: one for a forward pass, one for its backward.

What is no tensor reaches them as text and numbers (`effseg.operators.encoding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
C = torch._C
# A custom operator runs below autograd, where no graph is recorded. Sweeps pull gradients back through a
# graph of each slab, so these keys are put back.
AUTOGRAD = C.DispatchKeySet(C.DispatchKey.AutogradFunctionality)
for _key in (C.DispatchKey.AutogradOther, C.DispatchKey.AutogradNestedTensor, C.DispatchKey.ADInplaceOrView):
    AUTOGRAD = AUTOGRAD | C.DispatchKeySet(_key)


@contextmanager
def _as_in_a_node(device_type: str) -> Iterator[None]:
    """The state in which an autograd node runs: autocast off, a graph recorded only where asked for."""
    include, exclude = C._dispatch_tls_local_include_set(), C._dispatch_tls_local_exclude_set()
    with (
        C._ForceDispatchKeyGuard(include, exclude - AUTOGRAD),
        torch.autocast(device_type, enabled=False),
        torch.no_grad(),
    ):
        yield


def registered(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The custom operator effseg::`schema`, whose first arguments are a text and numbers and whose outputs
    `fake` allocates."""
    name, _, signature = schema.partition("(")

    @wraps(run)
    def kernel(text: str, numbers: list[int], *arguments: Any) -> Any:
        flat = [t for a in arguments for t in (a if isinstance(a, Sequence) else (a,))]
        with _as_in_a_node(next(t.device.type for t in flat if isinstance(t, Tensor))):
            return run(text, numbers, *arguments)

    made: Any = torch.library.custom_op(f"effseg::{name}", kernel, mutates_args=(), schema=f"({signature}")
    made.register_fake(fake)
    return made


def gradients(
    found: Sequence[Tensor | None],
    of: Sequence[Tensor | None],
    needed: Sequence[bool],
    inputs: Sequence[Tensor | None],
) -> list[Tensor]:
    """Those that are needed, laid out as `fake_gradients` says, and no view of the operator's inputs or of
    each other, which an operator must not give (a node may)."""
    known = {t.untyped_storage().data_ptr() for t in inputs if t is not None}
    given = []
    for grad, like, need in zip(found, of, needed, strict=True):
        if not need or like is None:
            continue
        if grad is None:
            grad = torch.zeros_like(like)
        elif grad.untyped_storage().data_ptr() in known or not _same_layout(grad, like):
            grad = torch.empty_like(like).copy_(grad)
        known.add(grad.untyped_storage().data_ptr())
        given.append(grad)
    return given


def fake_gradients(of: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    return [torch.empty_like(t) for t, need in zip(of, needed, strict=True) if need and t is not None]


def spread(given: Sequence[T], there: Sequence[bool]) -> list[T | None]:
    """Each in its place, None elsewhere."""
    rest = iter(given)
    return [next(rest) if is_there else None for is_there in there]


def _same_layout(grad: Tensor, like: Tensor) -> bool:
    """Whether grad has the strides of `empty_like(like)`; those of axes of one voxel say nothing."""
    wanted = torch.empty_like(like, device="meta").stride()
    strides = zip(grad.shape, grad.stride(), wanted, strict=True)
    return all(size == 1 or stride == want for size, stride, want in strides)
