"""EffSegNet: a residual encoder with a light additive decoder, trained on whole volumes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effseg import functional
from effseg.deferred import Deferred
from effseg.errors import InputError
from effseg.models.base import SegmentationModel, check_image, check_sizes
from effseg.modules import ConvNormAct3d, ResidualBlock3d
from effseg.normalisation import NORMS

MEMORY_MODES = ("raw", "stream")


@dataclass(frozen=True)
class Architecture:
    """widths: channels per level, level i + 1 at half the resolution of level i; blocks: residual blocks
    per level; stem_stride: 2 for a network without full-resolution features, whose logits are upsampled."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    stem_stride: int = 1


PRESETS = {
    "base": Architecture((16, 32, 48, 64, 64, 64), (0, 1, 1, 1, 1, 2)),
    "large": Architecture((16, 32, 64, 96, 128, 128), (0, 1, 1, 1, 1, 2)),
    "large-w32": Architecture((32, 48, 64, 96, 128, 128), (0, 1, 1, 1, 1, 2)),
    "tiny": Architecture((32, 48, 64, 64, 64), (1, 1, 1, 1, 2), stem_stride=2),
}


class EncoderLevel(nn.Module):
    """The unit that enters a level (with its stride), then residual blocks."""

    def __init__(self, in_channels: int, channels: int, stride: int, blocks: int, norm: str) -> None:
        super().__init__()
        self.enter = ConvNormAct3d(in_channels, channels, stride=stride, norm=norm)
        self.blocks = nn.ModuleList(ResidualBlock3d(channels, norm) for _ in range(blocks))

    def deferred(self, x: Tensor | Deferred, slab_elements: int | None, recompute: bool = False) -> Deferred:
        h = self.enter.deferred(x, slab_elements)
        for block in self.blocks:
            assert isinstance(block, ResidualBlock3d)
            h = block.recomputed(h, slab_elements) if recompute else block.deferred(h, slab_elements)
        return h


class DecoderLevel(nn.Module):
    """unit(skip + upsample_x2(conv1x1(coarse)))."""

    def __init__(self, coarse_channels: int, channels: int, norm: str) -> None:
        super().__init__()
        self.lateral = nn.Conv3d(coarse_channels, channels, 1, bias=False)
        self.unit = ConvNormAct3d(channels, channels, norm=norm)

    def joined(self, skip: Deferred, coarse: Deferred) -> Deferred:
        return functional.upsample_add(skip, coarse, self.lateral.weight)

    def deferred(self, skip: Deferred, coarse: Deferred, slab_elements: int | None) -> Deferred:
        return self.unit.deferred(self.joined(skip, coarse), slab_elements)


class EffSegNet(SegmentationModel):
    """A segmentation network for whole CT volumes that keeps one raw convolution output per layer.

    Our reading of Wang, Oda and Mori 2020 (arXiv 2003.10690), of which only the abstract is known to us: six
    levels (five for ``tiny``) of 3x3x3 convolutions without bias, normalisation and leaky ReLU 0.01;
    residual blocks in the encoder; in the decoder a 1x1x1 convolution on the coarse grid, trilinear x2
    upsampling, addition of the skip and one convolution. 1.76 M parameters (``base``, 15 classes).

    in_channels, num_classes (background included); preset: ``base`` (widths 16, 32, 48, 64, 64, 64),
    ``large`` (16, 32, 64, 96, 128, 128), ``large-w32`` (32, 48, 64, 96, 128, 128; for many classes) or
    ``tiny`` (no full-resolution features, logits upsampled; for voxels of 1 mm or less); norm: ``instance``,
    ``batch`` or ``group``; memory: ``raw`` (one raw output per convolution is kept for backward).

    Any volume size works, odd ones too: upsampled tensors are cut to the skip's size. Images are of any
    float dtype or int16, labels of any integer dtype; both are read slab by slab as they are. Compute and
    storage follow ``torch.autocast`` of the image's device, else the weights' dtype; statistics and the
    loss are float32 (float64 for float64).

    Memory of a training step on 1x1x512x512x512 with 15 classes: see ``effseg plan``. Raises `InputError`
    (a `ValueError`) for unknown options and for shapes that do not fit.
    """

    follows_autocast = True

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        preset: str = "base",
        norm: str = "instance",
        memory: str = "raw",
    ) -> None:
        check_sizes(in_channels, num_classes)
        for option, value, known in (
            ("preset", preset, PRESETS),
            ("norm", norm, NORMS),
            ("memory", memory, MEMORY_MODES),
        ):
            if value not in known:
                raise InputError(f"{option}: expected one of {', '.join(known)}, got {value!r}")
        super().__init__(
            f"effseg-{preset}",
            dict(in_channels=in_channels, num_classes=num_classes, preset=preset, norm=norm, memory=memory),
        )
        self.architecture = PRESETS[preset]
        self.slab_elements: int | None = None
        self.recompute_levels = 0
        widths, blocks = self.architecture.widths, self.architecture.blocks
        if num_classes > 2 * widths[0]:
            warnings.warn(
                f"{num_classes} classes are read from {widths[0]} features a voxel: a preset with a wider "
                f"first level (large-w32) will tell them apart better",
                stacklevel=2,
            )
        inputs, strides = (in_channels, *widths), (self.architecture.stem_stride, *[2] * (len(widths) - 1))
        self.encoder = nn.ModuleList(
            EncoderLevel(inputs[i], widths[i], strides[i], blocks[i], norm) for i in range(len(widths))
        )
        self.decoder = nn.ModuleList(
            DecoderLevel(widths[i + 1], widths[i], norm) for i in range(len(widths) - 1)
        )
        self.head = nn.Conv3d(widths[0], num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, K, D, H, W) in the compute dtype; `loss` and `segment` need far less memory."""
        x, weight, bias = self._head(self._features(image, streamed=False), image)
        if weight is None:
            return functional.materialise(x, slab_elements=self.slab_elements)
        return functional.conv3d(x, weight, bias, statistics=False, slab_elements=self.slab_elements)[0]

    def loss(self, image: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Dice + cross-entropy without full-size logits: `effseg.functional.segmentation_loss`'s options."""
        options["slab_elements"] = self.slab_elements
        if not self._streams:
            x, weight, bias = self._head(self._features(image, streamed=False), image)
            return functional.segmentation_loss(x, labels, weight, bias, **options)
        tail, unit = self._tail(image)
        layer = (unit.conv.weight, unit.norm, unit.negative_slope)
        return functional.tail_segmentation_loss(
            tail, labels, layer, self.head.weight, self.head.bias, **options
        )

    @torch.no_grad()
    def segment(self, image: Tensor) -> Tensor:
        features = self._features(image, streamed=self._streams)
        return functional.segment(*self._head(features, image), slab_elements=self.slab_elements)

    @property
    def _streams(self) -> bool:
        """Without full-resolution features there is nothing to stream but the logits, which always are."""
        return self.arguments["memory"] == "stream" and self.architecture.stem_stride == 1

    def _trunk(self, image: Tensor, streamed: bool) -> tuple[Deferred, Deferred]:
        """The skip of the last decoder level, and the coarse features that it gets."""
        check_image(image, self.arguments["in_channels"])
        levels: list[Deferred] = []
        for i, level in enumerate(self.encoder):
            assert isinstance(level, EncoderLevel)
            if i == 0 and streamed:
                levels.append(level.enter.streamed(image, self.slab_elements))
            else:
                recompute = 0 < i <= self.recompute_levels
                levels.append(level.deferred(levels[-1] if levels else image, self.slab_elements, recompute))
        h = levels.pop()
        for decoder in reversed(self.decoder[1:]):
            assert isinstance(decoder, DecoderLevel)
            h = decoder.deferred(levels.pop(), h, self.slab_elements)
        return levels.pop(), h

    def _tail(self, image: Tensor) -> tuple[Deferred, ConvNormAct3d]:
        """The streamed input of the last layer, and that layer."""
        last = self.decoder[0]
        assert isinstance(last, DecoderLevel)
        return last.joined(*self._trunk(image, streamed=True)), last.unit

    def _features(self, image: Tensor, streamed: bool) -> Deferred:
        """The last decoder level: (N, widths[0], D, H, W), half of that for ``tiny``."""
        if not streamed:
            last = self.decoder[0]
            assert isinstance(last, DecoderLevel)
            return last.deferred(*self._trunk(image, streamed=False), self.slab_elements)
        tail, unit = self._tail(image)
        return unit.streamed_layer(tail, self.slab_elements)

    def _head(self, features: Deferred, image: Tensor) -> tuple[Deferred, Tensor | None, Tensor | None]:
        """What the head operators take. Without full-resolution features the 1x1x1 convolution runs on the
        coarse grid and the expression itself is the upsampled logits."""
        if self.architecture.stem_stride == 1:
            return features, self.head.weight, self.head.bias
        d, h, w = image.shape[2:]
        return (
            functional.upsample_add(None, features, self.head.weight, self.head.bias, (d, h, w)),
            None,
            None,
        )
