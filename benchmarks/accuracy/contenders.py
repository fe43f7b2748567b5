"""Who is compared, and nnU-Net's network as one that this package trains, saves and loads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effseg.benchmarking.networks import NNUNET_WIDTHS, plain_conv_unet
from effseg.conversion.convert import convert
from effseg.data.preprocessing import AIR
from effseg.errors import InputError
from effseg.models.base import SegmentationModel, check_image, check_sizes
from effseg.models.registry import build_model, register
from effseg.models.unet3d import UNet3D

Triple = tuple[int, int, int]
SMALLEST = 4
"""Voxels along an axis at nnU-Net's lowest level."""


@dataclass(frozen=True)
class Contender:
    """network: a key of `_NAMES`, or a name that `build_model` knows; patches: trained on patches."""

    network: str
    patches: bool = False

    @property
    def name(self) -> str:
        return self.network + ("-patches" if self.patches else "")

    def register(self, size: Triple, device: torch.device) -> str:
        """Make the network known to training; returns the name that it has there.

        size: of the volumes, or patches, that it trains on, by which nnU-Net's is planned. Every network gets
        the memory format in which its steps are fastest on `device`: numbers do not depend on it.
        """
        if self.network == "nnunet":
            name = f"nnunet-{'x'.join(map(str, size))}"
            register(name, partial(NNUNet, size=size), NNUNet)
            return name
        if self.network == "unet3d" and device.type == "cpu":
            register("unet3d-channels-last", _unet3d_channels_last, UNet3D)
            return "unet3d-channels-last"
        return self.network


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("effseg-base"),
        Contender("effseg-large"),
        Contender("effseg-base", patches=True),
        Contender("unet3d"),
        Contender("unet3d", patches=True),
        Contender("nnunet"),
        Contender("nnunet", patches=True),
    )
}


def _unet3d_channels_last(in_channels: int, num_classes: int) -> SegmentationModel:
    """Two thirds of the time a step on a CPU with AMX."""
    model = build_model("unet3d", in_channels, num_classes)
    model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return model


class NNUNet(SegmentationModel):
    """nnU-Net's PlainConvUNet, planned for volumes of about `size` and converted by `effseg.convert`.

    Depth and strides are those of nnU-Net's planner for isotropic voxels (`strides_for`), widths and first
    weights its own; without deep supervision, so that all contenders have one loss. Volumes whose sizes its
    strides do not divide are padded with air, and the logits cropped.
    """

    follows_autocast = True

    def __init__(self, in_channels: int, num_classes: int, size: Sequence[int]) -> None:
        check_sizes(in_channels, num_classes)
        if in_channels != 1:
            raise InputError(f"in_channels: expected 1, got {in_channels}")
        arguments = {"in_channels": 1, "num_classes": num_classes, "size": list(size)}
        super().__init__("nnunet", arguments)
        strides = strides_for(size)
        self.factors = [math.prod(axis) for axis in zip(*strides, strict=True)]
        network = plain_conv_unet(num_classes, NNUNET_WIDTHS[: len(strides)], strides=strides)
        network.apply(network.initialize)  # type: ignore[arg-type]
        self.network = convert(network)
        # It holds its encoder twice, and every layer by two names: files have each tensor once.
        self.register_state_dict_post_hook(_leave_aliases_out)
        self.register_load_state_dict_pre_hook(_put_aliases_in)

    def forward(self, image: Tensor) -> Tensor:
        """image (N, 1, D, H, W), normalised -> logits (N, K, D, H, W)."""
        check_image(image, 1)
        depth, height, width = image.shape[2:]
        missing = [-extent % factor for extent, factor in zip(image.shape[2:], self.factors, strict=True)]
        if not any(missing):
            return self.network(image)
        pads = [pad for axis in reversed(missing) for pad in (0, axis)]
        return self.network(F.pad(image, pads, value=AIR))[:, :, :depth, :height, :width]


def strides_for(size: Sequence[int]) -> list[Triple]:
    """Of every stage, (D, H, W): an axis is halved while it keeps `SMALLEST` voxels, five times at most."""
    if len(size) != 3 or min(size) < 1:
        raise InputError(f"size: expected three lengths above 0, got {tuple(size)}")
    halvings = [
        min(len(NNUNET_WIDTHS) - 1, max(0, int(math.log2(extent / SMALLEST)))) if extent > SMALLEST else 0
        for extent in size
    ]
    stages = range(max(halvings))
    return [(1, 1, 1)] + [tuple(2 if stage < n else 1 for n in halvings) for stage in stages]  # type: ignore[misc]


def _tensors(model: nn.Module, remove_duplicate: bool) -> dict[str, Tensor]:
    named = (model.named_parameters, model.named_buffers)
    return dict(itertools.chain.from_iterable(f(remove_duplicate=remove_duplicate) for f in named))


def _leave_aliases_out(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    own = {prefix + name for name in _tensors(model, remove_duplicate=True)}
    for key in [key for key in state if key.startswith(prefix) and key not in own]:
        del state[key]


def _put_aliases_in(model: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    names = {id(tensor): prefix + name for name, tensor in _tensors(model, remove_duplicate=True).items()}
    for name, tensor in _tensors(model, remove_duplicate=False).items():
        if names[id(tensor)] in state:
            state.setdefault(prefix + name, state[names[id(tensor)]])
