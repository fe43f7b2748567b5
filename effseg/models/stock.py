"""EffSegNet in plain stock torch: what its operators are tested and measured against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effseg.models.base import SegmentationModel, check_image
from effseg.models.effsegnet import DecoderLevel, EffSegNet, EncoderLevel
from effseg.modules import ConvNormAct3d, ResidualBlock3d


class StockEffSegNet(EffSegNet):
    """The same network, arguments and state dict, every layer computed by torch's own modules and kept by
    torch's autograd. Architecture and implementation can so be told apart in a comparison."""

    follows_autocast = False
    loss = SegmentationModel.loss
    segment = SegmentationModel.segment

    def forward(self, image: Tensor) -> Tensor:
        check_image(image, self.arguments["in_channels"])
        weight = self.head.weight
        x = image if image.is_floating_point() else image.to(weight.dtype)
        skips = []
        for level in self.encoder:
            assert isinstance(level, EncoderLevel)
            x = _unit(level.enter, x)
            for block in level.blocks:
                assert isinstance(block, ResidualBlock3d)
                x = _residual(block, x)
            skips.append(x)
        x = skips.pop()
        for decoder in reversed(self.decoder):
            assert isinstance(decoder, DecoderLevel)
            skip = skips.pop()
            x = _unit(decoder.unit, skip + _upsample(decoder.lateral(x), skip.shape))
        logits = self.head(x)
        return logits if self.architecture.stem_stride == 1 else _upsample(logits, image.shape)


def _unit(unit: ConvNormAct3d, x: Tensor) -> Tensor:
    return F.leaky_relu(unit.norm(unit.conv(x)), unit.negative_slope)


def _residual(block: ResidualBlock3d, x: Tensor) -> Tensor:
    inner = block.last.norm(block.last.conv(_unit(block.unit, x)))
    return F.leaky_relu(x + inner, block.negative_slope)


def _upsample(x: Tensor, like: tuple[int, ...]) -> Tensor:
    d, h, w = like[2:]
    return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)[:, :, :d, :h, :w]
