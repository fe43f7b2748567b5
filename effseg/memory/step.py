"""The training step that is predicted on fake tensors and measured on real ones."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from effseg.errors import InputError
from effseg.losses import dice_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Loss = Callable[..., torch.Tensor]


def make_optimizer(name: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """`adamw`, or `sgd` with nnU-Net's momentum."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, 1e-3)
    if name == "sgd":
        return torch.optim.SGD(parameters, 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
    raise InputError(f"optimizer: expected adamw or sgd, got {name!r}")


def follows_autocast(model: nn.Module) -> bool:
    return bool(getattr(model, "follows_autocast", False))


def label_dtype_for(model: nn.Module, asked: torch.dtype | None) -> torch.dtype:
    """uint8, unless torch's own loss widens labels to int64 anyway: then the batch is counted as that."""
    return asked or (torch.uint8 if follows_autocast(model) else torch.int64)


def training_loss(
    model: nn.Module, image: torch.Tensor, labels: torch.Tensor, loss: Loss | None, options: dict[str, Any]
) -> torch.Tensor:
    """The model's own loss if it has one and none is given, else `loss` of what it returns, or Dice and
    cross-entropy of its logits and the mean square of any other tensor.

    Several outputs (deep supervision) are weighted as in nnU-Net: 1, 1/2, 1/4 ..., and the coarsest not.
    """
    if loss is None and getattr(model, "has_own_loss", False):
        own: torch.Tensor = cast(Any, model).loss(image, labels, **options)
        return own
    outputs = _outputs(model(image))
    if len(outputs) > 1 and outputs[-1].dim() == 5 and outputs[-1].shape[2:] != outputs[0].shape[2:]:
        outputs = outputs[:-1]
    parts = []
    for i, output in enumerate(outputs):
        if loss is None and not _are_logits(output, labels):
            part = output.float().square().mean()
        else:
            part = (loss or dice_cross_entropy)(output, _coarse(labels, output), **options)
        parts.append(part / 2**i)
    return sum(parts[1:], start=parts[0])


def _outputs(found: Any) -> list[torch.Tensor]:
    """Whatever is in there that a loss may be of; MONAI's DynUNet stacks its outputs."""
    tensors = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if len(tensors) == 1 and tensors[0].dim() == 6:
        return list(tensors[0].unbind(1))
    return tensors


def _are_logits(output: torch.Tensor, labels: torch.Tensor) -> bool:
    return (
        output.dim() == 5
        and output.shape[1] > 1
        and all(size % small == 0 for size, small in zip(labels.shape[1:], output.shape[2:], strict=True))
    )


def _coarse(labels: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    if output.dim() != 5 or labels.shape[1:] == output.shape[2:]:
        return labels
    d, h, w = (size // small for size, small in zip(labels.shape[1:], output.shape[2:], strict=True))
    return labels[:, ::d, ::h, ::w].contiguous()
