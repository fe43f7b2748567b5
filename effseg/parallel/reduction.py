"""Sums over the processes that share a volume, in float64 and in the order of ranks: the same bits in all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effseg.parallel.partition import current


def gathered(tensor: Tensor) -> list[Tensor]:
    """Every process's tensor, in the order of ranks."""
    split = current()
    return [tensor] if split is None else split.transport.gather(tensor)


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each over all processes, in its own type; one message for all."""
    if current() is None:
        return list(tensors)
    flat = torch.cat([t.reshape(-1).double() for t in tensors])
    parts = gathered(flat)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    found = total.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(found, tensors, strict=True)]


def summed_where(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`summed` of those that are there: the same ones in every process."""
    there = [t for t in tensors if t is not None]
    found = iter(summed(there) if there else [])
    return [None if t is None else next(found) for t in tensors]


def smallest(value: int, device: torch.device) -> int:
    """Of every process's."""
    split = current()
    if split is None:
        return value
    told = torch.tensor([value], dtype=torch.int64, device=device)
    return min(int(found) for found in split.transport.gather(told))


def whole(rows: Tensor, total: int) -> Tensor:
    """(N, D, H, W) of `total` rows from every process's rows (N, d, H, W), in every process."""
    split = current()
    if split is None:
        return rows
    shares = [hi - lo for lo, hi in (split.rows(total, rank) for rank in range(split.size))]
    n, own, h, w = rows.shape
    padded = rows.new_zeros(n, max(shares), h, w)  # a gather takes tensors of one shape
    padded[:, :own] = rows
    parts = gathered(padded.view(torch.uint8))  # which every backend sends
    return torch.cat([part.view(rows.dtype)[:, :d] for part, d in zip(parts, shares, strict=True)], 1)
