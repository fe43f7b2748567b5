"""Soft Dice + cross-entropy in plain torch: the baseline's loss, and what fused losses must equal."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from effseg.errors import InputError
from effseg.parallel.partition import current

__all__ = ["LossOptions", "dice_cross_entropy"]

SPACE = (2, 3, 4)
OWN_LOSS = "effseg_loss"
"""Attribute of logits that know a better way to their loss, those of a converted network in training: a
function of them, labels and `LossOptions`, or None."""


class ClassSums(Protocol):
    """Sums over the voxels that are not ignored: intersection, probability, voxels (N, K); nll and smooth_nll
    (N,)."""

    @property
    def intersection(self) -> torch.Tensor: ...
    @property
    def probability(self) -> torch.Tensor: ...
    @property
    def voxels(self) -> torch.Tensor: ...
    @property
    def nll(self) -> torch.Tensor: ...
    @property
    def smooth_nll(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class LossOptions:
    """The options of `dice_cross_entropy`: dice_weight * (1 - mean Dice) + ce_weight * cross-entropy.

    class_weights: (K,) or None. Raises `InputError` (a `ValueError`) or `TypeError` for what is no option.
    """

    class_weights: torch.Tensor | None = None
    ignore_index: int | None = None
    include_background: bool = False
    batch_dice: bool = False
    label_smoothing: float = 0.0
    dice_weight: float = 1.0
    ce_weight: float = 1.0
    smooth: float = 1e-5
    process_group: Any = None

    def __post_init__(self) -> None:
        weights = self.class_weights
        if weights is not None and not isinstance(weights, torch.Tensor):
            raise TypeError(f"class_weights: expected a tensor (K,) or None, got {type(weights).__name__}")
        if weights is not None and weights.requires_grad:
            raise InputError("class_weights: expected a tensor without gradient, got one that requires it")
        if not 0 <= self.label_smoothing <= 1:
            raise InputError(f"label_smoothing: expected 0 to 1, got {self.label_smoothing}")

    def of_sums(self, sums: ClassSums) -> torch.Tensor:
        """The loss, a float64 scalar: it depends on a batch through these sums alone."""
        group = GroupSum(self.process_group)
        classes = sums.voxels.shape[1]
        first = 0 if self.include_background else 1
        dice = mean_dice_of_sums(
            sums.intersection[:, first:],
            sums.probability[:, first:],
            sums.voxels[:, first:],
            self.batch_dice,
            self.smooth,
            group,
        )
        weights = self.class_weights
        w = torch.ones_like(sums.voxels[0]) if weights is None else weights.double()
        total = sums.nll
        if self.label_smoothing:  # classes ruled out by a logit of -inf have an infinite sum here
            total = (1 - self.label_smoothing) * total + self.label_smoothing / classes * sums.smooth_nll
        ce = ratio(group.sum(total.sum()), group.sum((sums.voxels @ w).sum()), 0.0)
        return self.dice_weight * (1 - dice) + self.ce_weight * ce


def dice_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    class_weights: torch.Tensor | None = None,
    ignore_index: int | None = None,
    include_background: bool = False,
    batch_dice: bool = False,
    label_smoothing: float = 0.0,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    smooth: float = 1e-5,
    process_group: Any = None,
) -> torch.Tensor:
    """``dice_weight * (1 - mean Dice) + ce_weight * cross-entropy``, a scalar.

    logits: (N, K, D, H, W), any float dtype, K >= 2; half precision is widened to float32 first.
    labels: (N, D, H, W), any integer dtype, values 0..K-1 or `ignore_index`.
    class_weights: (K,) or None, for the cross-entropy, as in :func:`torch.nn.functional.cross_entropy` with
        ``reduction="mean"``; `label_smoothing` too is its.
    ignore_index: voxels with this label count nowhere. A batch of nothing else has the loss 0 and gradients
        of zeros: every Dice is 1, as of a class that is neither there nor found, and the cross-entropy is 0.
    Soft Dice of a class is ``(2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)`` (V-Net, 3DV 2016, with
    MONAI's squares left out and smoothing as in its DiceLoss), its mean over samples and classes;
    `batch_dice` takes the sums over the batch too; class 0 takes part if `include_background`.
    process_group: a torch.distributed group, or True for the default one: every sum is also over its
        processes, each of which gets the loss of the whole batch and world-size times its own part of the
        gradient, so that gradients averaged by DDP are those of one process with the whole batch.

    The target is a boolean one-hot tensor, as in nnU-Net's memory-efficient soft Dice (Isensee et al.,
    Nature Methods 2021). Logits of a converted network (`effseg.convert`) are never made if its last layer is
    a 1x1x1 convolution, and their probabilities never are. Raises InputError where shapes or dtypes do not
    fit, and for labels that are neither a class nor ignored; of stored logits on a GPU, torch's assertion
    there does.
    """
    if (own := getattr(logits, OWN_LOSS, None)) is not None:
        options = LossOptions(
            class_weights, ignore_index, include_background, batch_dice, label_smoothing, dice_weight,
            ce_weight, smooth, process_group,
        )  # fmt: skip
        found: torch.Tensor = own(logits, labels, options)
        return found
    if current() is not None:
        raise InputError(
            "logits: expected lazy ones of a converted network (or use model.loss) where processes share a "
            "volume, got stored rows"
        )
    _check(logits, labels, class_weights)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if class_weights is not None:
        class_weights = class_weights.to(logits)
    group = GroupSum(process_group)
    targets = labels.long()
    _check_values(targets, logits.shape[1], ignore_index)
    dice, voxels = _mean_dice(logits, targets, ignore_index, include_background, batch_dice, smooth, group)
    ce = _cross_entropy(logits, targets, voxels, class_weights, ignore_index, label_smoothing, group)
    return dice_weight * (1 - dice) + ce_weight * ce


def ratio(numerator: torch.Tensor, denominator: torch.Tensor, otherwise: float) -> torch.Tensor:
    """numerator / denominator, and `otherwise`, with gradients of zero, where the denominator is 0: a mean
    over nothing. Chosen on the device, without a look at the numbers."""
    empty = denominator == 0
    return numerator.masked_fill(empty, otherwise) / denominator.masked_fill(empty, 1.0)


def _mean_dice(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int | None,
    include_background: bool,
    batch_dice: bool,
    smooth: float,
    group: "GroupSum",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean Dice, and the voxels of every class that are not ignored, (N, K)."""
    probabilities = torch.softmax(logits, 1)
    first = 0 if include_background else 1
    with torch.no_grad():
        keep = None if ignore_index is None else (targets != ignore_index).unsqueeze(1)
        classes = targets.unsqueeze(1) if keep is None else targets.unsqueeze(1).where(keep, 0)
        one_hot = torch.zeros(probabilities.shape, dtype=torch.bool, device=logits.device)
        one_hot.scatter_(1, classes, True if keep is None else keep)
        voxels = one_hot.sum(SPACE, dtype=logits.dtype)
        one_hot = one_hot[:, first:]
    probabilities = probabilities[:, first:]
    if keep is not None:
        probabilities = probabilities * keep
    sums = ((probabilities * one_hot).sum(SPACE), probabilities.sum(SPACE), voxels[:, first:])
    return mean_dice_of_sums(*sums, batch_dice, smooth, group), voxels


def mean_dice_of_sums(
    intersection: torch.Tensor,
    sum_p: torch.Tensor,
    sum_t: torch.Tensor,
    batch_dice: bool,
    smooth: float,
    group: "GroupSum",
) -> torch.Tensor:
    """Mean of (2 intersection + smooth) / (sum_p + sum_t + smooth), sums of (N, classes), as in
    `dice_cross_entropy`."""
    if batch_dice:
        intersection, sum_p, sum_t = (group.sum(x.sum(0)) for x in (intersection, sum_p, sum_t))
        return ratio(2 * intersection + smooth, sum_p + sum_t + smooth, 1.0).mean()
    dice = ratio(2 * intersection + smooth, sum_p + sum_t + smooth, 1.0)
    return group.sum(dice.sum()) / group.sum(torch.full_like(dice[0, 0], dice.numel()))


def _cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    voxels: torch.Tensor,
    class_weights: torch.Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    group: "GroupSum",
) -> torch.Tensor:
    """torch's with ``reduction="mean"``, which is 0 / 0 where nothing counts. voxels: as of `_mean_dice`."""
    ignore = -100 if ignore_index is None else ignore_index
    total = F.cross_entropy(
        logits, targets, class_weights, ignore_index=ignore, label_smoothing=label_smoothing, reduction="sum"
    )
    # Not by a matrix product: autocast would round the counts, and those above 65504 to infinity in fp16.
    weight = voxels.sum() if class_weights is None else (voxels * class_weights).sum()
    return ratio(group.sum(total), group.sum(weight), 0.0)


class GroupSum:
    """Sums over the processes of a group, or over this one alone."""

    def __init__(self, process_group: Any) -> None:
        self._active = process_group is not None and process_group is not False
        self._group = None if process_group is True else process_group

    def __bool__(self) -> bool:
        return self._active

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over processes; its gradient reaches `part` times the number of processes."""
        if not self._active:
            return part
        world = dist.get_world_size(self._group)
        total = part.detach().clone()
        dist.all_reduce(total, group=self._group)
        return world * part + (total - world * part.detach())


def _check(logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None) -> None:
    if logits.dim() != 5 or logits.shape[1] < 2:
        raise InputError(f"logits: expected (N, K, D, H, W) with K >= 2, got {tuple(logits.shape)}")
    expected = (logits.shape[0], *logits.shape[2:])
    if labels.shape != expected:
        raise InputError(f"labels: expected the logits' shape {tuple(expected)}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels: expected an integer dtype, got {labels.dtype}")
    if class_weights is not None and class_weights.shape != (logits.shape[1],):
        raise InputError(
            f"class_weights: expected shape ({logits.shape[1]},), got {tuple(class_weights.shape)}"
        )


def _check_values(targets: torch.Tensor, classes: int, ignore_index: int | None) -> None:
    """On a CPU alone: a GPU would be waited for. A fake tensor has no values, a traced one none yet."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(targets, FakeTensor):
        return
    unknown = (targets < 0) | (targets >= classes)
    if ignore_index is not None:
        unknown &= targets != ignore_index
    unknown_labels(unknown.sum(), classes)


def unknown_labels(unknown: torch.Tensor, classes: int) -> None:
    """Refuse labels. unknown: of any shape, how many are neither a class nor ignored."""
    if count := int(unknown.sum()):
        raise InputError(
            f"labels: expected 0 to {classes - 1} or ignore_index, {count} voxels have other values"
        )
