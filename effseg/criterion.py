"""`SegmentationLoss`: Dice + cross-entropy of whatever a network returns in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effseg.common.settings import Function
from effseg.errors import InputError
from effseg.losses import LossOptions, dice_cross_entropy
from effseg.parallel.halo import picked
from effseg.parallel.partition import current, own_shape

Labels = Tensor | Sequence[Tensor]
WHOLE = 1e-3
"""How far a label of a float type may lie from a whole number: farther than any rounding of one."""


class SegmentationLoss(nn.Module):
    """sum_i w_i (dice_weight (1 - mean soft Dice_i) + ce_weight cross-entropy_i) over a network's outputs i.

    Called with (outputs, labels). outputs: logits (N, K, D, H, W); a list of them, the largest first (deep
    supervision); or MONAI DynUNet's stack of them, (N, outputs, K, D, H, W). Logits of a converted network
    (`effseg.convert`) are lazy: their head, softmax and sums then run slab by slab and no logits are ever
    stored; of other networks the loss is `effseg.losses.dice_cross_entropy`. labels: (N, D, H, W) or
    (N, 1, D, H, W) of any integer type (a float type is taken if it holds whole numbers to 1e-3, as MONAI's
    do), or one such tensor for every output; one tensor is taken at the nearest voxels for smaller outputs.

    weights: of the outputs; by default 1, 1/2, 1/4, ... and 0 for the last of several, divided by their sum,
    as in nnU-Net (Isensee et al., Nature Methods 2021); an output of weight 0 gets a gradient of 0. options:
    those of `dice_cross_entropy`.
    Memory kept for backward with lazy logits: the labels. Raises `ValueError` where shapes do not fit, and
    for labels that are neither a class nor ignored (stored logits on a GPU: torch's assertion there).
    """

    def __init__(self, weights: Sequence[float] | None = None, **options: Any) -> None:
        super().__init__()
        class_weights = LossOptions(**options).class_weights  # checks them all
        self.weights = None if weights is None else tuple(float(w) for w in weights)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.options = {name: value for name, value in options.items() if name != "class_weights"}

    def forward(self, outputs: Tensor | Sequence[Tensor], labels: Labels) -> Tensor:
        given = _listed(outputs)
        ignored = self.options.get("ignore_index")
        if isinstance(labels, Tensor):
            wanted = [integers(labels, ignored)] * len(given)
        else:
            wanted = [integers(own, ignored) for own in labels]
        if not given or len(wanted) != len(given):
            raise InputError(f"labels: expected one for each of {len(given)} outputs, got {len(wanted)}")
        losses = [
            weight * dice_cross_entropy(logits, nearest(own, logits, given[0].shape[2]), **self._options())
            if weight
            else Unused.apply(logits)
            for weight, logits, own in zip(self._weights(len(given)), given, wanted, strict=True)
        ]
        return torch.stack(losses).sum()

    def _options(self) -> dict[str, Any]:
        return self.options | {"class_weights": self.class_weights}

    def _weights(self, count: int) -> tuple[float, ...]:
        if self.weights is None:
            return nnunet_weights(count)
        if len(self.weights) != count:
            raise InputError(f"outputs: expected {len(self.weights)}, one for each weight, got {count}")
        return self.weights


class Unused(Function):
    """0 of a tensor, whose gradient is 0: DistributedDataParallel waits for a gradient of every parameter.

    Saved: nothing.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.like = logits.shape, logits.dtype, logits.device
        wide = torch.promote_types(logits.dtype, torch.float32)
        return torch.zeros((), dtype=wide, device=logits.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.zeros((), dtype=dtype, device=device).expand(shape)


def nnunet_weights(count: int) -> tuple[float, ...]:
    """1, 1/2, 1/4, ... with 0 for the last of several, divided by their sum."""
    weights = [0.5**i for i in range(count)]
    if count > 1:
        weights[-1] = 0.0
    return tuple(weight / sum(weights) for weight in weights)


def _listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(outputs, Tensor):
        return list(outputs)
    return list(outputs.unbind(1)) if outputs.dim() == 6 else [outputs]


def integers(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Labels of any shape; those of a float type rounded, in int16, or int32 where `ignore_index` wants it.

    What is no whole number to `WHOLE`, is not finite or does not fit becomes a number that is neither a class
    nor ignored: the loss counts such labels on their device and refuses them when it knows their number, so
    that the host does not wait once more, and a compiled step needs no answer.
    """
    if not labels.is_floating_point():
        return labels
    narrow = torch.iinfo(torch.int16)
    wide = ignore_index is not None and not narrow.min <= ignore_index <= narrow.max
    dtype = torch.int32 if wide else torch.int16
    unknown = torch.iinfo(dtype).min
    if unknown == ignore_index:
        unknown += 1
    found = labels.round().to(dtype)
    # From what came out, which is near neither to NaN nor to what has wrapped around.
    is_whole = (labels - found).abs_() <= WHOLE
    return found.masked_fill_(~is_whole, unknown)


def nearest(labels: Tensor, logits: Tensor, rows: int = 0) -> Tensor:
    """Labels (N, D, H, W), integer, on the grid of the logits: those of the voxels nearest to its centres
    (torch's "nearest-exact"). rows: of the labels of a whole volume that processes share."""
    if labels.dim() == 5 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() != 4:
        raise InputError(f"labels: expected (N, D, H, W) or (N, 1, D, H, W), got {tuple(labels.shape)}")
    first = 1
    if current() is not None:
        if own_shape((rows, 1, 1))[0] != labels.shape[1]:
            raise InputError(f"labels: expected this process's part of {rows} rows, got {labels.shape[1]}")
        labels, first = _own_nearest(labels, logits.shape[2], rows), 2
    for dim, size in enumerate(logits.shape[1 + first :], start=first):
        if labels.shape[dim] != size:
            centres = (torch.arange(size, device=labels.device) + 0.5) * (labels.shape[dim] / size)
            labels = labels.index_select(dim, centres.long())
    return labels


def _own_nearest(labels: Tensor, size: int, rows: int) -> Tensor:
    """Along the first axis, which processes share."""
    if size == rows:
        return labels
    centres = (torch.arange(size) + 0.5) * (rows / size)
    return picked(centres.long().tolist(), labels, rows)
