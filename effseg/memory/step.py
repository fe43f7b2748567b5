"""The training step that is predicted on fake tensors and measured on real ones."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from effseg.errors import InputError
from effseg.losses import dice_cross_entropy
from effseg.models.base import SegmentationModel

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
    """The model's own loss if it has one and none is given, else `loss` of what it returns.

    Lists of outputs (deep supervision) are weighted as in nnU-Net: 1, 1/2, 1/4 ..., and the coarsest not.
    """
    if loss is None and isinstance(model, SegmentationModel):
        return model.loss(image, labels, **options)
    loss = loss or dice_cross_entropy
    outputs = model(image)
    if isinstance(outputs, torch.Tensor):
        return loss(outputs, labels, **options)
    total = loss(outputs[0], labels, **options)
    for i, output in enumerate(outputs[1:-1], start=1):
        step = [size // small for size, small in zip(labels.shape[1:], output.shape[2:], strict=True)]
        coarse = labels[:, :: step[0], :: step[1], :: step[2]].contiguous()
        total = total + loss(output, coarse, **options) / 2**i
    return total
