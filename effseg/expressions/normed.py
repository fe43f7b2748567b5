"""The deferred expression leaky_relu(norm(inner)), for what is normalised and not stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from effseg.expressions.base import TERMS, Deferred, Normalisation, Operations, Spec, Use, expect


@dataclass(frozen=True)
class Normed(Spec):
    """For an expression what `Raw` is for a stored tensor; stored is what inner stores."""

    slope: float
    inner: Spec

    def uses(self, lo: int, hi: int) -> list[Use]:
        return [*self.inner.uses(lo, hi), *TERMS]

    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        *inner, mean, scale, beta = tensors
        return ops.norm_act(self.inner.rows(ops, lo, hi, inner), mean, scale, beta, self.slope)


def normed(inner: Deferred, norm: Normalisation, slope: float) -> Deferred:
    """leaky_relu((inner - mean) * scale + beta, slope), terms (N, C)."""
    for name, term in zip(norm._fields, norm, strict=True):
        expect(name, tuple(term.shape) == inner.shape[:2], f"(N, C) = {inner.shape[:2]}", tuple(term.shape))
    return Deferred(Normed(inner.shape, inner.dtype, slope, inner.spec), (*inner.tensors, *norm))
