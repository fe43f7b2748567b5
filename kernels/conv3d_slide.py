"""The main loop of 3x3x3 convolutions of stride 1: a march along D with three rotating accumulators."""

from typing import NamedTuple

import triton
import triton.language as tl

from effseg.kernels.common import kernel, operand
from effseg.kernels.conv3d_epilogue import empty_sums, ending_of, store_plane, store_sums
from effseg.kernels.conv3d_loops import plane_base, tile_of


class Reading(NamedTuple):
    """How a program reads planes of x and a tap's weights."""

    elements: tl.tensor  # [BLOCK_M, BLOCK_K], of tap (0, 0) in the plane
    channels: tl.tensor  # [1, BLOCK_K], whether they exist
    scale: tl.tensor  # [1, BLOCK_K]
    shift: tl.tensor  # [1, BLOCK_K]
    weights: tl.tensor  # [BLOCK_K, BLOCK_N], element in one tap


@triton.jit
def slide_plane(
    acc0, acc1, acc2,  # [BLOCK_M, BLOCK_N] each
    plane_ptr,  # [H, W, C]
    w_ptr,  # [3, 3, 3, BLOCK_K, COLUMNS]
    tile, reading,
    turns, H, W,
    C: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
    PROLOGUE: tl.constexpr, SLOPE: tl.constexpr, MASKED: tl.constexpr, UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds an input plane's share to the three output rows that read it, acc_i += sum of a(x[kh, kw])
    w[2 - i, kh, kw].

    Of what is not MASKED only the channels are, and only where C is not BLOCK_K.
    """
    TAP: tl.constexpr = BLOCK_K * COLUMNS
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    for kh in range(3 if UNROLLED else turns):
        row_ptr = plane_ptr + kh * W * C
        for kw in tl.static_range(3):
            x_ptr = row_ptr + kw * C + reading.elements
            if MASKED:
                h = tile.vh + (kh - 1)
                w = tile.vw + (kw - 1)
                exists = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
                x = tl.load(x_ptr, mask=exists if C == BLOCK_K else exists & reading.channels, other=0)
            elif C == BLOCK_K:
                x = tl.load(x_ptr)
            else:
                x = tl.load(x_ptr, mask=reading.channels, other=0)
            a = operand(x, reading.scale, reading.shift, dtype, PROLOGUE, SLOPE)
            if MASKED and PROLOGUE:
                a = tl.where(exists, a, 0.0)
            tap_ptr = w_ptr + (kh * 3 + kw) * TAP + reading.weights
            acc2 = tl.dot(a, tl.load(tap_ptr), acc2, input_precision=PRECISION)
            acc1 = tl.dot(a, tl.load(tap_ptr + 9 * TAP), acc1, input_precision=PRECISION)
            acc0 = tl.dot(a, tl.load(tap_ptr + 18 * TAP), acc0, input_precision=PRECISION)
    return acc0, acc1, acc2


@kernel
def conv3d_slide_kernel(
    x_ptr,  # [N, D, H, W, C]
    w_ptr,  # [3, 3, 3, BLOCK_K, COLUMNS]
    out_ptr,  # [N, rows, H, W, CHANNELS]
    partial_ptr,  # [N, tiles, vectors, COLUMNS]
    pre_scale_ptr, pre_shift_ptr,  # [N, BLOCK_K]
    bias_ptr,  # [COLUMNS]
    y_ptr,  # [N, rows, H, W, CHANNELS]
    mean_ptr, scale_ptr, beta_ptr,  # [N, COLUMNS]
    x_stride, out_stride, y_stride,
    D, H, W, rows, offset, turns, tiles,
    C: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
    PROLOGUE: tl.constexpr, SLOPE: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE_SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_PLACE: tl.constexpr, UNROLLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output row q reads rows q + offset + (0, 1, 2); out is as high and wide as x."""
    # For every input row d, in order, and the output row q = d - 2 - offset that it is the last of:
    #   out_{q + i} += sum over kh, kw, c of a(x[d, h + kh - 1, w + kw - 1, c]) w[2 - i, kh, kw, c]
    #   for i = 0, 1, 2;   then out_q is stored, and out_{q + 1}, out_{q + 2} move up.
    # Tiles whose neighbours all exist take a branch without masks.
    COLUMNS: tl.constexpr = CHANNEL_BLOCKS * BLOCK_N
    n = tl.program_id(1)
    tile = tile_of(rows, H, W, CHANNEL_BLOCKS, BLOCK_D, BLOCK_H, BLOCK_W, BLOCK_N)
    interior = (tile.h > 0) & (tile.w > 0) & (tile.h + BLOCK_H < H) & (tile.w + BLOCK_W < W)
    k = tl.arange(0, BLOCK_K)
    if PROLOGUE:
        scale = tl.load(pre_scale_ptr + n * BLOCK_K + k)[None, :]
        shift = tl.load(pre_shift_ptr + n * BLOCK_K + k)[None, :]
    else:
        scale = 1.0
        shift = 0.0
    reading = Reading(
        ((tile.vh - 1) * W + tile.vw - 1)[:, None] * C + k[None, :],
        (k < C)[None, :],
        scale,
        shift,
        k[:, None] * COLUMNS + tile.column[None, :],
    )
    offsets = (tile.vh * W + tile.vw)[:, None] * CHANNELS + tile.column[None, :]  # [BLOCK_M, BLOCK_N]
    acc0 = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)  # output row q, complete after this plane
    acc1 = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)  # q + 1
    acc2 = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)  # q + 2
    ending = ending_of(
        partial_ptr, bias_ptr, mean_ptr, scale_ptr, beta_ptr, n, tile.index, tiles, COLUMNS, EPILOGUE
    )
    first, second = empty_sums(BLOCK_H * BLOCK_W, BLOCK_N, PER_PLACE)
    for q in range(tile.first_row - 2, tile.end_row):
        d = q + 2 + offset
        if (d >= 0) & (d < D):
            plane_ptr = plane_base(x_ptr, n, d, x_stride, H * W, C)
            if interior:
                acc0, acc1, acc2 = slide_plane(
                    acc0, acc1, acc2, plane_ptr, w_ptr, tile, reading, turns, H, W,
                    C, BLOCK_K, COLUMNS, PROLOGUE, SLOPE, False, UNROLLED, PRECISION,
                )  # fmt: skip
            else:
                acc0, acc1, acc2 = slide_plane(
                    acc0, acc1, acc2, plane_ptr, w_ptr, tile, reading, turns, H, W,
                    C, BLOCK_K, COLUMNS, PROLOGUE, SLOPE, True, UNROLLED, PRECISION,
                )  # fmt: skip
        if q >= tile.first_row:
            first, second = store_plane(
                acc0, first, second, q - tile.first_row, tile, ending, offsets,
                plane_base(out_ptr, n, q, out_stride, H * W, CHANNELS),
                plane_base(y_ptr, n, q, y_stride, H * W, CHANNELS),
                CHANNELS, COLUMNS, EPILOGUE, HAS_BIAS, EPILOGUE_SLOPE, BLOCK_N, PER_PLACE,
            )  # fmt: skip
        acc0 = acc1
        acc1 = acc2
        acc2 = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
    store_sums(first, second, tile, ending, COLUMNS, EPILOGUE, PER_PLACE)
