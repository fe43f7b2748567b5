"""What a convolution's program does with a finished plane of its tile: store it and reduce what it stores.

Device code shared by forward and dgrad. A tile is BLOCK_M = BLOCK_H * BLOCK_W voxels of one plane and BLOCK_N
channels. Sums go along with the march over planes, so that a program leaves one partial row, of two vectors
of BLOCK_N and, for STATISTICS, a third. PER_PLACE, they are registers, one of each sum for each place in the
tile, which saves a reduction across threads in every plane; else they are kept in the partial row, as a
vector would fill registers, too: it is repeated in every thread that holds the channel.

    mean_{t+1} = mean_t + (v - mean_t) / (t + 1),  M_{t+1} = M_t + (v - mean_t) (v - mean_{t+1})  (Welford)
    M = M_a + M_b + n_a n_b / (n_a + n_b) (mean_b - mean_a)^2                                     (Chan)

=========== ========================= =========================================================
epilogue    stored                    partial row
=========== ========================= =========================================================
PLAIN       acc + bias                none
STATISTICS  acc + bias                mean and sum of squared deviations of the stored values, their number
BACKWARD    dz * scale,               sum of dz (y - mean), sum of dz
            dz = act'(norm(y)) * acc
=========== ========================= =========================================================
"""

from typing import NamedTuple

import triton
import triton.language as tl

from effseg.kernels.common import leaky_relu_backward
from effseg.kernels.conv3d_loops import plane_base

PLAIN = tl.constexpr(0)
STATISTICS = tl.constexpr(1)
BACKWARD = tl.constexpr(2)


@triton.constexpr_function
def vectors(epilogue: int) -> int:
    """Of a partial row."""
    return 3 if epilogue == 1 else 2


class Ending(NamedTuple):
    """What a finished plane meets: this sample's terms, padded to whole blocks, and the partial row."""

    row_ptr: tl.tensor  # [vectors, COLUMNS]
    bias_ptr: tl.tensor  # [COLUMNS]
    mean_ptr: tl.tensor  # [COLUMNS]
    scale_ptr: tl.tensor  # [COLUMNS]
    beta_ptr: tl.tensor  # [COLUMNS]


@triton.jit
def ending_of(
    partial_ptr,  # [N, tiles, vectors, COLUMNS]
    bias_ptr,  # [COLUMNS]
    mean_ptr, scale_ptr, beta_ptr,  # [N, COLUMNS]
    n, tile, tiles,
    COLUMNS: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The `Ending` of sample n and a tile."""
    row_ptr = plane_base(partial_ptr, n, tile, tiles, 1, vectors(EPILOGUE) * COLUMNS)
    terms = n * COLUMNS
    return Ending(row_ptr, bias_ptr, mean_ptr + terms, scale_ptr + terms, beta_ptr + terms)


@triton.jit
def empty_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_PLACE: tl.constexpr):
    """The two sums before the first plane, (BLOCK_M, BLOCK_N) each if PER_PLACE."""
    zeros = tl.zeros((BLOCK_M, BLOCK_N) if PER_PLACE else (1, 1), tl.float32)
    return zeros, zeros


@triton.jit
def store_plane(
    acc,  # [BLOCK_M, BLOCK_N] float32
    first, second,  # [BLOCK_M, BLOCK_N] each if PER_PLACE, else unused
    planes,  # how many are in the sums already
    tile, ending,
    offsets,  # [BLOCK_M, BLOCK_N], element in the plane, of out and of y alike
    out_plane_ptr, y_plane_ptr,  # [HO, WO, CHANNELS]
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SLOPE: tl.constexpr, BLOCK_N: tl.constexpr, PER_PLACE: tl.constexpr,
):  # fmt: skip
    """Stores acc and adds a plane to the sums: (first, second), which it gives, if PER_PLACE, else those of
    the partial row. Sums per place are not masked."""
    column = tile.column
    mask = tile.inside[:, None]
    if CHANNELS % BLOCK_N != 0:
        mask = mask & (column < CHANNELS)[None, :]
    if HAS_BIAS:
        acc += tl.load(ending.bias_ptr + column)[None, :]
    if EPILOGUE == BACKWARD:
        y = tl.load(y_plane_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(ending.scale_ptr + column)[None, :]
        centred = y - tl.load(ending.mean_ptr + column)[None, :]
        dz = leaky_relu_backward(acc, centred * scale + tl.load(ending.beta_ptr + column)[None, :], SLOPE)
        tl.store(out_plane_ptr + offsets, (dz * scale).to(out_plane_ptr.dtype.element_ty), mask=mask)
        if PER_PLACE:
            first += dz * centred
            second += dz
        else:
            dz = tl.where(tile.inside[:, None], dz, 0.0)
            so_far, too = load_row(ending.row_ptr, column, COLUMNS, planes)
            store_row(ending.row_ptr, column, COLUMNS, so_far + tl.sum(dz * centred, 0), too + tl.sum(dz, 0))
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
                mean, squares = moments(value, tile.inside, tile.voxels)
                mean_so_far, squares_so_far = load_row(ending.row_ptr, column, COLUMNS, planes)
                delta = mean - mean_so_far
                squares += squares_so_far + delta * delta * (planes * tile.voxels * share)
                store_row(ending.row_ptr, column, COLUMNS, mean_so_far + delta * share, squares)
    return first, second


@triton.jit
def moments(value, inside, voxels):
    """Mean and sum of squared deviations of value [BLOCK_M, BLOCK_N] over the places inside, [BLOCK_N]
    each."""
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
    first, second,  # [BLOCK_M, BLOCK_N] each if PER_PLACE, else unused
    tile, ending,
    COLUMNS: tl.constexpr, EPILOGUE: tl.constexpr, PER_PLACE: tl.constexpr,
):  # fmt: skip
    """The partial row [vectors, COLUMNS], float32, from the sums per place over all of the program's
    planes."""
    column, inside = tile.column, tile.inside
    planes = tile.end_row - tile.first_row
    if EPILOGUE == STATISTICS:
        count = tl.zeros_like(column).to(tl.float32) + (planes * tile.voxels).to(tl.float32)
        tl.store(ending.row_ptr + 2 * COLUMNS + column, count)
    if PER_PLACE:
        if EPILOGUE == STATISTICS:
            mean, squares = moments(first, inside, tile.voxels)
            squares = tl.sum(tl.where(inside[:, None], second, 0.0), 0) + planes * squares
            store_row(ending.row_ptr, column, COLUMNS, mean, squares)
        elif EPILOGUE == BACKWARD:
            first = tl.sum(tl.where(inside[:, None], first, 0.0), 0)
            second = tl.sum(tl.where(inside[:, None], second, 0.0), 0)
            store_row(ending.row_ptr, column, COLUMNS, first, second)
