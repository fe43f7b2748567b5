"""A sample as a matrix of voxels by channels: the tiling that elementwise kernels and reductions share.

The channels-last rows of a sample are one array of voxels * C values. A tile is BLOCK_V voxels by BLOCK_C
channels, so what belongs to a channel is loaded once a program and no offset is divided by C. Where BLOCK_C
does not divide C the last block of channels is masked; masks are constant over 16 values where C is divisible
by 16, so loads stay wide.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effseg.kernels.choose import choose
from effseg.kernels.config import Config, blocks
from effseg.kernels.launch import DTYPES, channels_last, problem


@triton.jit
def load_term(ptr, n, channels, C: tl.constexpr):
    """Row n of an [N, C] float32 array at `channels` [BLOCK_C], as [1, BLOCK_C]; 0 from C on."""
    return tl.load(ptr + n * C + channels, mask=channels < C, other=0.0)[None, :]


@triton.jit
def tile_address(n, tile, stride, C: tl.constexpr, BLOCK_V: tl.constexpr):
    """Offset of a tile's first voxel in a tensor whose samples are `stride` voxels apart; scalar, int64."""
    return n.to(tl.int64) * stride * C + (tl.zeros((), tl.int64) + tile) * (BLOCK_V * C)


@triton.jit
def tile_offsets(channels, C: tl.constexpr, BLOCK_V: tl.constexpr):
    """Offsets inside a tile, [BLOCK_V, BLOCK_C] int32."""
    return tl.arange(0, BLOCK_V)[:, None] * C + channels[None, :]


@triton.jit
def tile_mask(tile, voxels, channels, C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which values of a tile exist, [BLOCK_V, BLOCK_C]; [BLOCK_V, 1] where no channel needs a mask."""
    inside = (tile * BLOCK_V + tl.arange(0, BLOCK_V) < voxels)[:, None]
    if C % BLOCK_C == 0:
        return inside
    else:
        return inside & (channels < C)[None, :]


class Tiling(NamedTuple):
    """samples, channels, voxels: the tensor's; channel_blocks, tiles: of a sample; programs: its reducers."""

    samples: int
    channels: int
    voxels: int
    channel_blocks: int
    tiles: int
    programs: int
    config: Config

    @property
    def grid(self) -> tuple[int, int]:
        """One program for every tile."""
        return self.tiles * self.channel_blocks, self.samples

    @property
    def reduction_grid(self) -> tuple[int, int]:
        """`programs` for all tiles of a sample, each of which takes every `programs`-th."""
        return self.programs * self.channel_blocks, self.samples

    @property
    def constants(self) -> dict[str, int]:
        return {
            "C": self.channels,
            "BLOCK_V": self.config.block_w,
            "BLOCK_C": self.config.block_n,
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }


def tiling(op: str, x: Tensor, config: Config | None) -> Tiling:
    """How x (N, C, d, h, w) is tiled: block_w voxels by block_n channels, `splits` programs a reduction."""
    n, c, d, h, w = x.shape
    config = config or choose(problem(op, x))
    voxels = d * h * w
    if voxels >= 2**31 - config.block_w:
        raise ValueError(f"{op}: expected fewer than 2^31 voxels in a sample, got {voxels}")
    channel_blocks = blocks(c, config.block_n)
    tiles = blocks(voxels, config.block_w)
    programs = max(1, min(tiles, config.splits // max(1, n * channel_blocks)))
    return Tiling(n, c, voxels, channel_blocks, tiles, programs, config)


def feature(name: str, x: Tensor) -> Tensor:
    """An input of any layout, channels last; raises `TypeError` for types that no kernel computes in."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
    return channels_last(x)


def output(name: str, out: Tensor, shape: torch.Size) -> Tensor:
    """A preallocated output, which must be channels last already."""
    if out.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(out.shape)}")
    if feature(name, out) is not out:
        raise ValueError(f"{name}: expected channels last, got strides {out.stride()}")
    return out


def term(name: str, t: Tensor, x: Tensor) -> Tensor:
    """A (N, C) float32 term of x, contiguous."""
    if t.shape != x.shape[:2] or t.dtype != torch.float32:
        raise ValueError(
            f"{name}: expected float32 of shape {tuple(x.shape[:2])}, got {t.dtype} {tuple(t.shape)}"
        )
    return t.contiguous()
