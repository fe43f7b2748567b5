"""What EffSegNet is made of: presets, encoder levels, decoder levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from effseg import functional
from effseg.expressions.base import Deferred
from effseg.modules import ConvNormAct3d, ResidualBlock3d, recomputed
from effseg.offload.memory import HostMemory

Triple = tuple[int, int, int]


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


class Level(NamedTuple):
    """One level of the network. kernel, stride: of the unit that enters it; decoder_kernel: of the decoder's
    unit."""

    in_channels: int
    channels: int
    blocks: int
    kernel: Triple
    stride: Triple
    decoder_kernel: Triple


def levels_of(architecture: Architecture, in_channels: int, thick_axis: int | None) -> list[Level]:
    """All levels, the finest first. The full-resolution layers do not look across a thick axis, and the first
    stride leaves it alone."""
    widths, wide = architecture.widths, (3, 3, 3)
    flat, first = _per_axis(3, 1, thick_axis), _per_axis(2, 1, thick_axis)
    strides = [first, (2, 2, 2)] if architecture.stem_stride == 2 else [(1, 1, 1), first]
    strides += [(2, 2, 2)] * (len(widths) - 2)
    kernels = [flat] + [wide] * (len(widths) - 1)
    decoder_kernels = kernels if architecture.stem_stride == 1 else [wide] * len(widths)
    inputs = (in_channels, *widths)
    return list(map(Level, inputs, widths, architecture.blocks, kernels, strides, decoder_kernels))


def _per_axis(value: int, thick: int, thick_axis: int | None) -> Triple:
    d, h, w = (thick if axis == thick_axis else value for axis in range(3))
    return d, h, w


class EncoderLevel(nn.Module):
    """The unit that enters a level (with its stride), then residual blocks."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        norm: str,
        kernel_size: Triple = (3, 3, 3),
        stride: Triple = (2, 2, 2),
    ) -> None:
        super().__init__()
        self.enter = ConvNormAct3d(in_channels, channels, kernel_size, stride, norm=norm)
        self.blocks = nn.ModuleList(ResidualBlock3d(channels, norm) for _ in range(blocks))

    def deferred(
        self,
        x: Tensor | Deferred,
        slab_elements: int | None,
        recompute: bool = False,
        host: HostMemory | None = None,
    ) -> Deferred:
        """host: where raw outputs are stored, None: on their device."""
        blocks = [cast(ResidualBlock3d, block) for block in self.blocks]
        if recompute and blocks and isinstance(x, Deferred) and not torch.compiler.is_compiling():
            h = recomputed(self.enter, blocks.pop(0), x, slab_elements)
        else:
            h = self.enter.deferred(x, slab_elements, host)
        for block in blocks:
            h = block.recomputed(h, slab_elements) if recompute else block.deferred(h, slab_elements, host)
        return h


class DecoderLevel(nn.Module):
    """unit(skip + upsample(conv1x1(coarse))), upsampling by `factors`."""

    def __init__(
        self,
        coarse_channels: int,
        channels: int,
        norm: str,
        kernel_size: Triple = (3, 3, 3),
        factors: Triple = (2, 2, 2),
    ) -> None:
        super().__init__()
        self.lateral = nn.Conv3d(coarse_channels, channels, 1, bias=False)
        self.unit = ConvNormAct3d(channels, channels, kernel_size, norm=norm)
        self.factors = factors

    def joined(self, skip: Deferred, coarse: Deferred) -> Deferred:
        return functional.upsample_add(skip, coarse, self.lateral.weight, factors=self.factors)

    def deferred(self, skip: Deferred, coarse: Deferred, slab_elements: int | None) -> Deferred:
        return self.unit.deferred(self.joined(skip, coarse), slab_elements)
