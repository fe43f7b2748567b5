"""What a deferred expression is: see `effseg.expressions.layers` for the kinds there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from effseg.common.formats import CHANNELS_LAST
from effseg.common.settings import Function
from effseg.expressions.slabs import Window, slabs_and_those_before
from effseg.offload.slabs import Incoming, Wanted
from effseg.parallel.halo import Halo, Shard, fetch
from effseg.parallel.partition import Split, current

Rows = tuple[int, int]


@dataclass(frozen=True)
class Use:
    """Which part of a stored tensor a slab needs: some rows of one sample, one sample, or all of it.

    of: how many rows the tensor has, in all processes that share its volume; stands: it has no values; held:
    it lies in the host's memory.
    centre: of a normalisation, whose scale and beta follow; its gradient is -scale times that of beta.
    """

    rows: Rows | None = None
    per_sample: bool = False
    centre: bool = False
    of: int = 0
    stands: bool = False
    held: bool = False

    def cut(self, tensor: Tensor | Shard | Incoming, sample: int) -> Tensor:
        if isinstance(tensor, Shard | Incoming):
            assert self.rows is not None
            return tensor.cut(self.rows, sample)
        if self.rows is not None:
            return tensor[sample : sample + 1, :, self.rows[0] : self.rows[1]]
        return tensor[sample : sample + 1] if self.per_sample else tensor


SHARED = Use()  # weights, which come in the compute type
PER_SAMPLE = Use(per_sample=True)
TERMS = (Use(per_sample=True, centre=True), PER_SAMPLE, PER_SAMPLE)


class Operations(Protocol):
    """What expressions ask of an algorithm, on rows of one sample, (1, C, d, h, w), channels last in memory;
    pad: rows of zeros before and after them; terms are (1, C). All are differentiable."""

    def convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, pad: tuple[int, int]
    ) -> Tensor:
        """Convolution of a slab; weight and bias in its type."""

    def norm_act(
        self,
        y: Tensor,
        mean: Tensor,
        scale: Tensor,
        beta: Tensor,
        slope: float,
        addend: Tensor | None = None,
    ) -> Tensor:
        """leaky_relu((y - mean) * scale + beta + addend, slope). Slope 0 is ReLU, 1 no activation."""

    def upsample_add(
        self,
        x: Tensor,
        rows: tuple[int, int],
        height: int,
        width: int,
        factors: tuple[int, int, int],
        addend: Tensor | None,
    ) -> Tensor:
        """Rows [lo, hi) of trilinear upsampling of a slab, plus addend (which may be overwritten)."""


@dataclass(frozen=True)
class Spec(ABC):
    """How rows are made. `shape` is (N, C, D, H, W) of the value, `dtype` its (compute) type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def uses(self, lo: int, hi: int) -> list[Use]:
        """What rows [lo, hi) need of each stored tensor, in the order of `Deferred.tensors`."""

    @abstractmethod
    def rows(self, ops: Operations, lo: int, hi: int, tensors: Sequence[Tensor]) -> Tensor:
        """Rows [lo, hi) of one sample, (1, C, hi - lo, H, W), from the tensors cut as `uses` says, those that
        are SHARED `in_compute_type`."""


def in_compute_type(spec: Spec, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with weights as a sweep's slabs take them: in the compute type, kernels channels last."""
    uses = spec.uses(0, spec.shape[2])
    return [_low(t, spec.dtype) if use == SHARED else t for use, t in zip(uses, tensors, strict=True)]


Stored = Tensor | Shard | Incoming
"""A tensor as slabs are cut from it: with the rows that other processes hold, where its volume is split; from
the host's memory, where it lies there."""


def made_by(spec: Spec, window: Window | None) -> int:
    """Rows that a convolution with this window makes of an expression; without one, the expression's."""
    if window is None:
        return spec.shape[2]
    return window.output_size((spec.shape[2], spec.shape[3], spec.shape[4]))[0]


def halos(split: Split, spec: Spec, window: Window | None) -> list[Halo | None]:
    """What processes exchange of each stored tensor for a sweep over the rows of `made_by`; None of weights
    and of what there is one of for a sample."""
    total, uses_of_rank = made_by(spec, window), []
    for rank in range(split.size):
        lo, hi = split.rows(total, rank)
        if window is not None and lo < hi:
            lo, hi, _ = window.input_rows(lo, hi, spec.shape[2])
        uses_of_rank.append(spec.uses(lo, hi) if lo < hi else None)

    def halo(i: int, of: int) -> Halo:
        def needs(rank: int) -> Rows | None:
            uses = uses_of_rank[rank]
            return None if uses is None else uses[i].rows

        return Halo(split, of, needs)

    everything = spec.uses(0, spec.shape[2])
    return [None if use.rows is None else halo(i, use.of) for i, use in enumerate(everything)]


def readable(spec: Spec, tensors: Sequence[Tensor], window: Window | None, thickness: int) -> list[Stored]:
    """The tensors as a sweep's slabs take them: `in_compute_type`, and where the volume is split with the
    rows of other processes, which begin to come, as do those from the host's memory. window: of a convolution
    whose output rows the sweep makes; thickness: rows of a slab.
    """
    low, split = in_compute_type(spec, tensors), current()
    everything = spec.uses(0, spec.shape[2])
    if any(use.held for use in everything):
        return _from_host(spec, low, window, thickness)
    if split is None:
        return list(low)
    found: list[Stored] = [
        t if halo is None else Shard(t, halo, use.stands)
        for t, halo, use in zip(low, halos(split, spec, window), everything, strict=True)
    ]
    fetch(split, [one for one in found if isinstance(one, Shard)])
    return found


def incoming(held: Tensor, thickness: int, device: torch.device) -> Incoming:
    """A tensor in the host's memory, for a sweep over its own slabs."""
    plan = [
        Wanted(sample, lo, hi, lo, alike)
        for sample, lo, hi, _, alike in slabs_and_those_before(held.shape[0], held.shape[2], thickness)
    ]
    return Incoming(held, plan, device)


def _from_host(spec: Spec, tensors: Sequence[Tensor], window: Window | None, thickness: int) -> list[Stored]:
    """The same where some of them lie in the host's memory, of a volume that is not split."""

    def uses(lo: int, hi: int) -> list[Use]:
        if window is not None:
            lo, hi, _ = window.input_rows(lo, hi, spec.shape[2])
        return spec.uses(lo, hi)

    held = [i for i, use in enumerate(spec.uses(0, spec.shape[2])) if use.held]
    plans: dict[int, list[Wanted]] = {i: [] for i in held}
    for sample, lo, hi, before, alike in slabs_and_those_before(
        spec.shape[0], made_by(spec, window), thickness
    ):
        now, then = uses(lo, hi), None if before is None else uses(*before)
        for i, plan in plans.items():
            rows, had = now[i].rows, None if then is None else then[i].rows
            assert rows is not None
            new = rows[0] if had is None else min(max(had[1], rows[0]), rows[1])
            plan.append(Wanted(sample, *rows, new, alike))
    device = tensors[0].device
    return [Incoming(t, plans[i], device) if i in plans else t for i, t in enumerate(tensors)]


def _low(weight: Tensor, dtype: torch.dtype) -> Tensor:
    layout = CHANNELS_LAST if weight.dim() == 5 else torch.preserve_format
    return weight.detach().to(dtype, memory_format=layout)


class Standing(Function):
    """The value, with the gradient of what stands for it. Saved: nothing."""

    @staticmethod
    def forward(ctx, standing, value):  # type: ignore[no-untyped-def]
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


def stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without memory, for the gradient of what lies elsewhere, or nowhere."""
    return torch.empty((), dtype=dtype, device=device).expand(tuple(shape))


class Deferred(NamedTuple):
    """An expression of value (N, C, D, H, W): its specification and the tensors it is made of: features (N,
    C', D', H', W'), terms (N, C') and weights."""

    spec: Spec
    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, D, H, W) of the value."""
        return self.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type that the value is computed in."""
        return self.spec.dtype

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.tensors[0].device


class Normalisation(NamedTuple):
    """norm(y) = (y - mean) * scale + beta, each (N, C) in the accumulation type."""

    mean: Tensor
    scale: Tensor
    beta: Tensor


def expect(name: str, fits: bool, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {got}")
