"""The main loops of a convolution: what forward, stride-1 dgrad and a parity class of strided dgrad share.

All three are out[SPREAD q + CLASS] = epilogue(sum over taps t and channels of a(x[STEP q + offset + t]) w[t])
for q < (rows, height, width), where what is outside x counts as zero; only positions, the layout of the
weights and the epilogue tell forward and dgrad apart, and the host decides on those.

================== ====================================== ===================================================
loop               for                                    how
================== ====================================== ===================================================
conv3d_slide       3x3x3, step 1, C <= 64                 marches along D: a tile of input is read and
                                                          activated 9 times and not 27, feeding the three
                                                          output rows it is in
conv3d_tap         any                                    a loop over taps and blocks of channels
conv3d_few         few channels and taps                  taps and channels together are the contraction's
                                                          axis
================== ====================================== ===================================================

x [N, D, H, W, C], out [N, DO, HO, WO, CHANNELS] and y, of out's shape, as they are in memory. w: taps first,
then the contraction's axis padded to whole blocks with zeros, then COLUMNS = CHANNEL_BLOCKS * BLOCK_N.
pre_scale and pre_shift [N, padded C], float32: the prologue a = leaky_relu(x * scale + shift). bias
[COLUMNS], mean, scale and beta [N, COLUMNS], float32, are the epilogue's, partial [N, tiles, vectors,
COLUMNS], float32, what it leaves. Products are accumulated in float32. turns: how many the inner loop takes
(3 rows of taps in `slide`, taps times blocks of channels in `tap`); if UNROLLED, the compiler knows and may
unroll, which saves instructions and takes registers. Grid: (tiles * CHANNEL_BLOCKS, N).

BLOCK_M = BLOCK_H * BLOCK_W are the voxels of a tile, BLOCK_N its output channels, BLOCK_K of the contraction.
"""

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def plane_base(ptr, n, d, stride, plane, C: tl.constexpr):
    """ptr + (n * stride + d * plane) * C: samples are `stride`, planes `plane` voxels of C values apart. The
    only 64-bit arithmetic, and on scalars; all but one product is the same for every d."""
    zero = tl.zeros((), tl.int64)  # n and d may be Python ints in the interpreter
    return ptr + (zero + n) * stride * C + (zero + d) * ((zero + plane) * C)


class Tile(NamedTuple):
    """What a program makes of the output: a tile of a plane, in the rows of a march."""

    index: tl.tensor  # of the sample's tiles
    first_row: tl.tensor
    end_row: tl.tensor
    h: tl.tensor  # of its first voxel
    w: tl.tensor
    vh: tl.tensor  # [BLOCK_M], of every voxel
    vw: tl.tensor  # [BLOCK_M]
    inside: tl.tensor  # [BLOCK_M], whether it exists
    voxels: tl.tensor  # how many do
    column: tl.tensor  # [BLOCK_N], channels


@triton.jit
def tile_of(
    rows, height, width, channel_blocks,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The `Tile` of this program.

    Channel blocks of a tile are neighbours, which read the same input; then W, H, D.
    """
    index = tl.program_id(0) // channel_blocks
    across = tl.cdiv(width, BLOCK_W)
    down = tl.cdiv(height, BLOCK_H)
    first_row = index // (across * down) * BLOCK_D
    block = tl.program_id(0) % channel_blocks
    end_row = tl.minimum(first_row + BLOCK_D, rows)
    h = index // across % down * BLOCK_H
    w = index % across * BLOCK_W
    m = tl.arange(0, BLOCK_H * BLOCK_W)
    vh = h + m // BLOCK_W
    vw = w + m % BLOCK_W
    voxels = tl.minimum(BLOCK_H, height - h) * tl.minimum(BLOCK_W, width - w)
    inside = (vh < height) & (vw < width)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    return Tile(index, first_row, end_row, h, w, vh, vw, inside, voxels, column)
