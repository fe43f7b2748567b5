"""EffSegNet in plain stock torch: what its operators are tested and measured against."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from effseg.losses import dice_cross_entropy
from effseg.models.base import SegmentationModel, check_image
from effseg.models.effsegnet import AUXILIARY_WEIGHTS, EffSegNet
from effseg.models.levels import DecoderLevel, EncoderLevel, Triple
from effseg.modules import ConvNormAct3d, ResidualBlock3d


class StockEffSegNet(EffSegNet):
    """The same network, arguments and state dict, every layer computed by torch's own modules and kept by
    torch's autograd. Architecture and implementation can so be told apart in a comparison."""

    follows_autocast = False
    segment = SegmentationModel.segment
    probabilities = SegmentationModel.probabilities

    def forward(self, image: Tensor) -> Tensor:
        x = self._decoded(image)[0]
        logits = self.head(x)
        return (
            logits
            if self.architecture.stem_stride == 1
            else _upsample(logits, image.shape, self.first_stride)
        )

    def loss(self, image: Tensor, labels: Tensor, **options: Any) -> Tensor:
        if not self.auxiliary_heads:
            return dice_cross_entropy(self(image), labels, **options)
        levels = self._decoded(image)
        logits = self.head(levels[0])
        if self.architecture.stem_stride == 2:
            logits = _upsample(logits, image.shape, self.first_stride)
        outputs = [logits, *(head(x) for head, x in zip(self.auxiliary_heads, levels[1:], strict=False))]
        total = logits.new_zeros(())
        for weight, output in zip(AUXILIARY_WEIGHTS, outputs, strict=False):
            d, h, w = (
                -(-full // part) for full, part in zip(labels.shape[1:], output.shape[2:], strict=True)
            )
            total = total + weight * dice_cross_entropy(output, labels[:, ::d, ::h, ::w], **options)
        return total / sum(AUXILIARY_WEIGHTS[: len(outputs)])

    def _decoded(self, image: Tensor) -> list[Tensor]:
        """The decoder's levels, the finest first."""
        check_image(image, self.arguments["in_channels"])
        x = image if image.is_floating_point() else image.to(next(self.head.parameters()).dtype)
        skips = []
        for level in self.encoder:
            assert isinstance(level, EncoderLevel)
            x = _unit(level.enter, x)
            for block in level.blocks:
                assert isinstance(block, ResidualBlock3d)
                x = _residual(block, x)
            skips.append(x)
        x = skips.pop()
        decoded: list[Tensor] = []
        for decoder in reversed(self.decoder):
            assert isinstance(decoder, DecoderLevel)
            skip = skips.pop()
            x = _unit(decoder.unit, skip + _upsample(decoder.lateral(x), skip.shape, decoder.factors))
            decoded.insert(0, x)
        return decoded


def _unit(unit: ConvNormAct3d, x: Tensor) -> Tensor:
    return F.leaky_relu(unit.norm(unit.conv(x)), unit.negative_slope)


def _residual(block: ResidualBlock3d, x: Tensor) -> Tensor:
    inner = block.last.norm(block.last.conv(_unit(block.unit, x)))
    return F.leaky_relu(x + inner, block.negative_slope)


def _upsample(x: Tensor, like: tuple[int, ...], factors: Triple) -> Tensor:
    d, h, w = like[2:]
    return F.interpolate(x, scale_factor=factors, mode="trilinear", align_corners=False)[:, :, :d, :h, :w]
