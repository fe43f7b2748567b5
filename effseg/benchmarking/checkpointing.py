"""The baselines with torch's activation checkpointing around every level: only levels' inputs are kept.

Wrapped are the parts that a user of torch.utils.checkpoint would wrap, without rewriting any layer; weights
and state dicts stay as they are. A decoder's level is upsampling, concatenation and convolutions in one,
where the network's own modules allow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effseg.benchmarking import networks
from effseg.models.unet3d import UNet3D

# No network here draws random numbers in its forward pass.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class CheckpointedUNet3D(UNet3D):
    def _down(self, level: int, x: Tensor) -> Tensor:
        return _checkpoint(super()._down, level, x)

    def _up(self, level: int, skip: Tensor, x: Tensor) -> Tensor:
        return _checkpoint(super()._up, level, skip, x)


def plain_conv_unet(classes: int) -> nn.Module:
    network: Any = networks.plain_conv_unet(classes)
    return _nnunet(network, network.encoder.stages)


def residual_encoder_unet(classes: int) -> nn.Module:
    network: Any = networks.residual_encoder_unet(classes)
    return _nnunet(network, [network.encoder.stem, *network.encoder.stages])


def segresnet(classes: int) -> nn.Module:
    network: Any = networks.segresnet(classes)
    return _recomputed(network, [*network.down_layers, *network.up_layers, network.conv_final])


def dynunet(classes: int) -> nn.Module:
    network: Any = networks.dynunet(classes)
    levels = [network.input_block, *network.downsamples, network.bottleneck, *network.upsamples]
    return _recomputed(network, levels)


def basic_unet(classes: int) -> nn.Module:
    network: Any = networks.basic_unet(classes)
    return _recomputed(network, network.children())


def _recomputed(network: nn.Module, parts: Iterable[nn.Module]) -> nn.Module:
    """The network, its parts recomputed in backward."""
    for part in parts:
        part.forward = partial(_checkpoint, part.forward)
    return network


def _nnunet(network: Any, encoder_levels: Iterable[nn.Module]) -> nn.Module:
    network.decoder.forward = partial(_decoded, network.decoder)
    return _recomputed(network, encoder_levels)


def _decoded(decoder: Any, skips: Sequence[Tensor]) -> Tensor:
    """UNetDecoder.forward without deep supervision, level by level."""
    x = skips[-1]
    for i in range(len(decoder.stages)):
        x = _checkpoint(_decoder_level, decoder, i, x, skips[-(i + 2)])
    return x


def _decoder_level(decoder: Any, i: int, x: Tensor, skip: Tensor) -> Tensor:
    y = decoder.stages[i](torch.cat((decoder.transpconvs[i](x), skip), 1))
    return decoder.seg_layers[-1](y) if i == len(decoder.stages) - 1 else y
