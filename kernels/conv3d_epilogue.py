"""What a convolution's program does with a finished plane of its tile: store it and reduce what it stores.

Device code shared by forward and dgrad. A tile is BLOCK_M = BLOCK_H * BLOCK_W voxels of one plane and BLOCK_N
channels. Sums over a tile go along with the march over planes, so that a program leaves one partial row, of
two vectors of BLOCK_N:

=========== ========================= =========================================================
epilogue    stored                    partial row
=========== ========================= =========================================================
PLAIN       acc + bias                none
STATISTICS  acc + bias                mean and sum of squared deviations of the stored values
BACKWARD    dz * scale,               sum of dz (y - mean), sum of dz
            dz = act'(norm(y)) * acc
=========== ========================= =========================================================
"""

import triton
import triton.language as tl

from effseg.kernels.common import leaky_relu_backward

PLAIN = tl.constexpr(0)
STATISTICS = tl.constexpr(1)
BACKWARD = tl.constexpr(2)


@triton.jit
def plane_base(ptr, n, d, stride_n, plane):
    """ptr + n * stride_n + d * plane, where plane = H W C elements: the only 64-bit arithmetic, on scalars."""
    zero = tl.zeros((), tl.int64)  # n and d may be Python ints in the interpreter
    return ptr + (zero + n) * stride_n + (zero + d) * plane


@triton.jit
def tile_of(
    rows, height, width, channel_blocks, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """(channel block, tile, first row, row end, h of the tile, w of the tile) of this program.

    Channel blocks of a tile are neighbours, which read the same input; then W, H, D.
    """
    tile = tl.program_id(0) // channel_blocks
    across = tl.cdiv(width, BLOCK_W)
    down = tl.cdiv(height, BLOCK_H)
    first = tile // (across * down) * BLOCK_D
    return (
        tl.program_id(0) % channel_blocks,
        tile,
        first,
        tl.minimum(first + BLOCK_D, rows),
        tile // across % down * BLOCK_H,
        tile % across * BLOCK_W,
    )


@triton.jit
def voxels_of(h, w, height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(row, column, whether inside, how many are) of a tile's voxels, (BLOCK_M,) each and a scalar."""
    m = tl.arange(0, BLOCK_H * BLOCK_W)
    vh = h + m // BLOCK_W
    vw = w + m % BLOCK_W
    voxels = tl.minimum(BLOCK_H, height - h) * tl.minimum(BLOCK_W, width - w)
    return vh, vw, (vh < height) & (vw < width), voxels


@triton.jit
def store_plane(
    acc,
    first,
    second,
    seen,
    voxels,
    out_plane_ptr,
    y_plane_ptr,
    bias_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    offsets,
    inside,
    column,
    CHANNELS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Stores acc (BLOCK_M, BLOCK_N), float32, and gives the partial row (first, second) of one plane more.

    offsets (BLOCK_M, BLOCK_N): element in the plane, of out and of y alike; inside (BLOCK_M,): voxels that
    exist; column (BLOCK_N,): channels. bias, mean, scale and beta are rows of this sample, padded to
    whole blocks; seen: voxels in the partial row so far, voxels: those inside.
    """
    if CHANNELS % BLOCK_N == 0:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (column < CHANNELS)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + column)[None, :]
    if EPILOGUE == BACKWARD:
        y = tl.load(y_plane_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + column)[None, :]
        centred = y - tl.load(mean_ptr + column)[None, :]
        dz = leaky_relu_backward(acc, centred * scale + tl.load(beta_ptr + column)[None, :], SLOPE)
        dz = tl.where(inside[:, None], dz, 0.0)
        tl.store(out_plane_ptr + offsets, (dz * scale).to(out_plane_ptr.dtype.element_ty), mask=mask)
        first += tl.sum(dz * centred, 0)
        second += tl.sum(dz, 0)
    else:
        stored = acc.to(out_plane_ptr.dtype.element_ty)
        tl.store(out_plane_ptr + offsets, stored, mask=mask)
        if EPILOGUE == STATISTICS:
            value = tl.where(inside[:, None], stored.to(tl.float32), 0.0)
            mean = tl.sum(value, 0) / voxels
            deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
            share = voxels / (seen + voxels)  # Chan's merge
            delta = mean - first
            first += delta * share
            second += tl.sum(deviation * deviation, 0) + delta * delta * (seen * share)
    return first, second


@triton.jit
def store_partial(
    first,
    second,
    partial_ptr,
    n,
    tiles,
    tile,
    column,
    channel_blocks,
    EPILOGUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partial (N, tiles, 2, channel_blocks * BLOCK_N), float32."""
    if EPILOGUE != PLAIN:
        columns = channel_blocks * BLOCK_N
        row = plane_base(partial_ptr, n, tile, tiles * 2 * columns, 2 * columns)
        tl.store(row + column, first)
        tl.store(row + columns + column, second)
