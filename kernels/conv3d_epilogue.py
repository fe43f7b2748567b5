"""What a convolution's program does with a finished plane of its tile: store it and reduce what it stores.

Device code shared by forward and dgrad. A tile is BLOCK_M = BLOCK_H * BLOCK_W voxels of one plane and BLOCK_N
channels. Sums go along with the march over planes, so that a program leaves one partial row, of two vectors
of BLOCK_N and, for STATISTICS, a third. PER_PLACE, they are registers, one of each sum for each place in the
tile, which saves a reduction across threads in every plane; else they are kept in the partial row, as a
vector would fill registers, too: it is repeated in every thread that holds the channel.

=========== ========================= =========================================================
epilogue    stored                    partial row
=========== ========================= =========================================================
PLAIN       acc + bias                none
STATISTICS  acc + bias                mean and sum of squared deviations of the stored values, their number
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


@triton.constexpr_function
def vectors(epilogue: int) -> int:
    """Of a partial row."""
    return 3 if epilogue == 1 else 2


@triton.jit
def plane_base(ptr, n, d, stride, plane, C: tl.constexpr):
    """ptr + (n * stride + d * plane) * C: samples are `stride`, planes `plane` voxels of C values apart. The
    only 64-bit arithmetic, and on scalars; all but one product is the same for every d."""
    zero = tl.zeros((), tl.int64)  # n and d may be Python ints in the interpreter
    return ptr + (zero + n) * stride * C + (zero + d) * ((zero + plane) * C)


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
def empty_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_PLACE: tl.constexpr):
    """The two sums before the first plane, (BLOCK_M, BLOCK_N) each if PER_PLACE."""
    zeros = tl.zeros((BLOCK_M, BLOCK_N) if PER_PLACE else (1, 1), tl.float32)
    return zeros, zeros


@triton.jit
def store_plane(
    acc,
    first,
    second,
    planes,
    voxels,
    out_plane_ptr,
    y_plane_ptr,
    row_ptr,
    bias_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    offsets,
    inside,
    column,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PER_PLACE: tl.constexpr,
):
    """Stores acc (BLOCK_M, BLOCK_N), float32, and adds a plane to the sums: (first, second), which it gives,
    if PER_PLACE, else those at row_ptr.

    offsets (BLOCK_M, BLOCK_N): element in the plane, of out and of y alike; inside (BLOCK_M,): voxels that
    exist, of which there are `voxels`; column (BLOCK_N,): channels. bias, mean, scale and beta: this sample's
    row, padded to whole blocks. planes: how many are in the sums already. Sums per place are not masked.
    """
    mask = inside[:, None]
    if CHANNELS % BLOCK_N != 0:
        mask = mask & (column < CHANNELS)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + column)[None, :]
    if EPILOGUE == BACKWARD:
        y = tl.load(y_plane_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + column)[None, :]
        centred = y - tl.load(mean_ptr + column)[None, :]
        dz = leaky_relu_backward(acc, centred * scale + tl.load(beta_ptr + column)[None, :], SLOPE)
        tl.store(out_plane_ptr + offsets, (dz * scale).to(out_plane_ptr.dtype.element_ty), mask=mask)
        if PER_PLACE:
            first += dz * centred
            second += dz
        else:
            dz = tl.where(inside[:, None], dz, 0.0)
            so_far, too = load_row(row_ptr, column, COLUMNS, planes)
            store_row(row_ptr, column, COLUMNS, so_far + tl.sum(dz * centred, 0), too + tl.sum(dz, 0))
    else:
        stored = acc.to(out_plane_ptr.dtype.element_ty)
        tl.store(out_plane_ptr + offsets, stored, mask=mask)
        if EPILOGUE == STATISTICS:
            value = stored.to(tl.float32)
            share = 1.0 / (planes + 1).to(tl.float32)
            if PER_PLACE:  # Welford's update
                delta = value - first
                first += delta * share
                second += delta * (value - first)
            else:  # Chan's merge, of equal numbers of voxels a plane
                mean, squares = moments(value, inside, voxels)
                mean_so_far, squares_so_far = load_row(row_ptr, column, COLUMNS, planes)
                delta = mean - mean_so_far
                squares += squares_so_far + delta * delta * (planes * voxels * share)
                store_row(row_ptr, column, COLUMNS, mean_so_far + delta * share, squares)
    return first, second


@triton.jit
def moments(value, inside, voxels):
    """Mean and sum of squared deviations over the places inside, (BLOCK_N,) each."""
    mean = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / voxels
    deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@triton.jit
def load_row(row_ptr, column, COLUMNS: tl.constexpr, planes):
    """What the planes before left in the partial row; zeros before the first."""
    tl.debug_barrier()  # other threads may have stored what this one reads
    some = tl.zeros_like(column) < planes
    first = tl.load(row_ptr + column, mask=some, other=0.0)
    return first, tl.load(row_ptr + COLUMNS + column, mask=some, other=0.0)


@triton.jit
def store_row(row_ptr, column, COLUMNS: tl.constexpr, first, second):
    tl.store(row_ptr + column, first)
    tl.store(row_ptr + COLUMNS + column, second)


@triton.jit
def store_sums(
    first,
    second,
    planes,
    voxels,
    row_ptr,
    inside,
    column,
    COLUMNS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PER_PLACE: tl.constexpr,
):
    """The partial row (vectors, COLUMNS), float32, from the sums per place over all of the program's
    `planes`."""
    if EPILOGUE == STATISTICS:
        count = tl.zeros_like(column).to(tl.float32) + (planes * voxels).to(tl.float32)
        tl.store(row_ptr + 2 * COLUMNS + column, count)
    if PER_PLACE:
        if EPILOGUE == STATISTICS:
            mean, squares = moments(first, inside, voxels)
            squares = tl.sum(tl.where(inside[:, None], second, 0.0), 0) + planes * squares
            store_row(row_ptr, column, COLUMNS, mean, squares)
        elif EPILOGUE == BACKWARD:
            first = tl.sum(tl.where(inside[:, None], first, 0.0), 0)
            second = tl.sum(tl.where(inside[:, None], second, 0.0), 0)
            store_row(row_ptr, column, COLUMNS, first, second)
