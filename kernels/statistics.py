"""The moments of a normalisation, of every channel of stored values.

Two levels, both in a fixed order: a program takes every `programs`-th tile of a sample and keeps one running
result for each place in the tile, merged when all are read; the partial rows of all programs are merged in
float64, by a kernel, as a slab's statistics would otherwise be ten short operators.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from effseg.kernels.common import kernel
from effseg.kernels.config import Config, blocks
from effseg.kernels.flat import feature, tile_address, tile_mask, tile_offsets, tiling
from effseg.kernels.launch import launch, sample_stride

MERGED_PARTS, MERGED_CHANNELS = 128, 8
"""Of a tile of partial rows: 32 bytes of each, as memory is read at least, and eight values a thread."""


@kernel
def _moments_kernel(
    y_ptr,  # [N, voxels, C]
    partial_ptr,  # [N, programs, 3, C] float32: count, mean and sum of squared deviations
    voxels, y_stride,
    C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The moments of a program's tiles, in float32. Samples are y_stride voxels apart.

    Masked: voxels after the last, channels from C on. Every program has a tile with a voxel in it, so that no
    count is 0.
    """
    # For every `programs`-th tile [BLOCK_V, BLOCK_C], at each place (Welford):
    #   count += 1;   mean' = mean + (y - mean) / count;   m2 += (y - mean) (y - mean')
    # then over the places (Chan): m2 += count (mean - merged)^2, merged = sum of count mean / sum of count.
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, n = tl.program_id(0) // CHANNEL_BLOCKS, tl.program_id(1)
    programs = tl.num_programs(0) // CHANNEL_BLOCKS
    channels = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = tile_offsets(channels, C, BLOCK_V)

    count = tl.zeros((BLOCK_V, 1), tl.float32)
    mean = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(voxels, BLOCK_V), programs):
        mask = tile_mask(tile, voxels, channels, C, BLOCK_V, BLOCK_C)
        y = tl.load(y_ptr + tile_address(n, tile, y_stride, C, BLOCK_V) + offsets, mask=mask, other=0.0)
        y = y.to(tl.float32)
        delta = tl.where(mask, y - mean, 0.0)
        count += (tile * BLOCK_V + tl.arange(0, BLOCK_V) < voxels)[:, None].to(tl.float32)
        mean += delta * (1.0 / tl.maximum(count, 1.0))
        m2 += delta * (y - mean)

    total = tl.sum(count, 0)
    merged = tl.sum(count * mean, 0) / total
    apart = mean - merged[None, :]
    m2 += count * apart * apart
    partial = partial_ptr + (n * programs + program) * 3 * C + channels
    tl.store(partial, total + tl.zeros((BLOCK_C,), tl.float32), mask=channels < C)
    tl.store(partial + C, merged, mask=channels < C)
    tl.store(partial + 2 * C, tl.sum(m2, 0), mask=channels < C)


@kernel
def _merge_kernel(
    partial_ptr,  # [N, parts, 3, C] float32: count, mean and sum of squared deviations
    mean_ptr, var_ptr,  # [N, C] float32
    parts, voxels,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of `voxels` values from those of parts, in float64; a program has BLOCK_C
    channels of a sample. Masked: parts after the last, channels from C on."""
    # mean = sum of count_p mean_p / voxels;   var = sum of m2_p + count_p (mean_p - mean)^2 / voxels   (Chan)
    n = tl.program_id(1)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_P)
    rows_ptr = partial_ptr + n * parts * 3 * C + part[:, None] * (3 * C) + channels[None, :]
    voxels = tl.zeros((), tl.float64) + voxels
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_P):
        mask = (start + part < parts)[:, None] & (channels < C)[None, :]
        count = tl.load(rows_ptr + start * 3 * C, mask=mask, other=0.0)
        mean = tl.load(rows_ptr + start * 3 * C + C, mask=mask, other=0.0)
        total += count.to(tl.float64) * mean.to(tl.float64)
    merged = tl.sum(total, 0) / voxels
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_P):
        mask = (start + part < parts)[:, None] & (channels < C)[None, :]
        count = tl.load(rows_ptr + start * 3 * C, mask=mask, other=0.0)
        mean = tl.load(rows_ptr + start * 3 * C + C, mask=mask, other=0.0)
        m2 = tl.load(rows_ptr + start * 3 * C + 2 * C, mask=mask, other=0.0)
        apart = mean.to(tl.float64) - merged[None, :]
        squares += m2.to(tl.float64) + count.to(tl.float64) * apart * apart
    out = n * C + channels
    tl.store(mean_ptr + out, merged.to(tl.float32), mask=channels < C)
    tl.store(var_ptr + out, (tl.sum(squares, 0) / voxels).to(tl.float32), mask=channels < C)


def moments(y: Tensor, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (N, C) float32, over the voxels of y (N, C, d, h, w) as stored."""
    y = feature("y", y)
    tiles = tiling("moments", y, config)
    if tiles.voxels == 0:
        raise ValueError("y: expected at least one voxel, got none")
    partial = torch.empty(tiles.samples, tiles.programs, 3, tiles.channels, device=y.device)
    launch(
        _moments_kernel, tiles.reduction_grid, y, partial, tiles.voxels, sample_stride(y), **tiles.constants
    )
    mean, var = torch.empty(2, tiles.samples, tiles.channels, device=y.device).unbind(0)
    launch(
        _merge_kernel, (blocks(tiles.channels, MERGED_CHANNELS), tiles.samples),
        partial, mean, var, tiles.programs, tiles.voxels,
        C=tiles.channels, BLOCK_P=MERGED_PARTS, BLOCK_C=MERGED_CHANNELS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return mean, var


def merged(counts: Tensor, means: Tensor, squares: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (N, C) float32, from those of parts, (N, parts, C) float64: how many `voxels`
    they have, their means and sums of squared deviations. Chan's formula."""
    mean = (counts * means).sum(1).div_(voxels)
    apart = (means - mean[:, None]).square_()
    variance = torch.addcmul(squares, counts, apart).sum(1).div_(voxels)
    return mean.float(), variance.float()
