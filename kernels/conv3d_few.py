"""The main loop of a forward convolution of few channels and taps, such as a network's first.

Taps and channels together are the contraction's axis: 3x3x3 taps of one channel are one product of depth 32,
where a loop over taps would waste 15 of 16 channels.
"""

import triton.language as tl

from effseg.kernels.common import kernel
from effseg.kernels.conv3d_epilogue import (
    empty_sums,
    plane_base,
    store_plane,
    store_sums,
    tile_of,
    vectors,
    voxels_of,
)
from effseg.kernels.conv3d_loops import operand


@kernel
def conv3d_few_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    partial_ptr,
    pre_scale_ptr,
    pre_shift_ptr,
    bias_ptr,
    x_stride,
    out_stride,
    D,
    H,
    W,
    rows,
    height,
    width,
    offset,
    tiles,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,
    TAPS: tl.constexpr,
    STEP: tl.constexpr,
    OFFSETS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    SLOPE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_PLACE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[q] = epilogue(sum of w[t] a(x[STEP q + (offset, *OFFSETS) + t]) for t < TAPS).

    x (N, D, H, W, C), out (N, rows, height, width, CHANNELS); w (*TAPS, C) flattened and padded to whole
    blocks of BLOCK_K, then columns; pre_scale and pre_shift (N, C). Products are accumulated in float32, up
    to BLOCK_K of a sum in one instruction's. Every element of a load has its own mask.
    """
    COLUMNS: tl.constexpr = CHANNEL_BLOCKS * BLOCK_N
    DEPTH: tl.constexpr = TAPS[0] * TAPS[1] * TAPS[2] * C
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    n = tl.program_id(1)
    block, tile, first_row, end_row, h0, w0 = tile_of(
        rows, height, width, CHANNEL_BLOCKS, BLOCK_D, BLOCK_H, BLOCK_W
    )
    vh, vw, inside, voxels = voxels_of(h0, w0, height, width, BLOCK_H, BLOCK_W)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = (vh * width + vw)[:, None] * CHANNELS + column[None, :]
    h_first = vh * STEP[1] + OFFSETS[0]
    w_first = vw * STEP[2] + OFFSETS[1]
    row_ptr = plane_base(partial_ptr, n, tile, tiles, 1, vectors(EPILOGUE) * COLUMNS)
    first, second = empty_sums(BLOCK_H * BLOCK_W, BLOCK_N, PER_PLACE)
    for q in range(first_row, end_row):
        acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
        d_first = q * STEP[0] + offset
        plane_ptr = plane_base(x_ptr, n, d_first, x_stride, H * W, C)
        for start in tl.static_range(0, DEPTH, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            tap = k // C
            kd = tap // (TAPS[1] * TAPS[2])
            h = h_first[:, None] + (tap // TAPS[2] % TAPS[1])[None, :]
            w = w_first[:, None] + (tap % TAPS[2])[None, :]
            # The rows that do not exist, and the padding of the axis, have no columns.
            w_end = tl.where((d_first + kd >= 0) & (d_first + kd < D) & (k < DEPTH), W, 0)
            mask = (h >= 0) & (h < H) & (w >= 0) & (w < w_end[None, :])
            x = tl.load(
                plane_ptr + (((kd * H)[None, :] + h) * W + w) * C + (k % C)[None, :], mask=mask, other=0
            )
            scale = 1.0
            shift = 0.0
            if PROLOGUE:
                scale = tl.load(pre_scale_ptr + n * C + k % C)[None, :]
                shift = tl.load(pre_shift_ptr + n * C + k % C)[None, :]
            a = operand(x, scale, shift, dtype, PROLOGUE, SLOPE)
            if PROLOGUE:
                a = tl.where(mask, a, 0.0)
            weight = tl.load(w_ptr + k[:, None] * COLUMNS + column[None, :])
            acc = tl.dot(a, weight, acc, input_precision=PRECISION)
        first, second = store_plane(
            acc, first, second, q - first_row, voxels,
            plane_base(out_ptr, n, q, out_stride, height * width, CHANNELS), out_ptr,
            row_ptr, bias_ptr, bias_ptr, bias_ptr, bias_ptr, offsets, inside, column,
            CHANNELS, COLUMNS, EPILOGUE, HAS_BIAS, 1.0, BLOCK_N, PER_PLACE,
        )  # fmt: skip
    store_sums(
        first, second, end_row - first_row, voxels, row_ptr, inside, column, COLUMNS, EPILOGUE, PER_PLACE
    )
