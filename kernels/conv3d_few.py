"""The main loop of a forward convolution of few channels and taps, such as a network's first.

Taps and channels together are the contraction's axis: 3x3x3 taps of one channel are one product of depth 32,
where a loop over taps would waste 15 of 16 channels.
"""

import triton.language as tl

from effseg.kernels.common import kernel, operand
from effseg.kernels.conv3d_epilogue import empty_sums, ending_of, store_plane, store_sums
from effseg.kernels.conv3d_loops import plane_base, tile_of


@kernel
def conv3d_few_kernel(
    x_ptr,  # [N, D, H, W, C]
    w_ptr,  # [*TAPS, C] flattened and padded to whole blocks of BLOCK_K, then COLUMNS
    out_ptr,  # [N, rows, height, width, CHANNELS]
    partial_ptr,  # [N, tiles, vectors, COLUMNS]
    pre_scale_ptr, pre_shift_ptr,  # [N, C]
    bias_ptr,  # [COLUMNS]
    x_stride, out_stride,
    D, H, W, rows, height, width, offset, tiles,
    C: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
    TAPS: tl.constexpr, STEP: tl.constexpr, OFFSETS: tl.constexpr,
    PROLOGUE: tl.constexpr, SLOPE: tl.constexpr, EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_PLACE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[q] = epilogue(sum of w[t] a(x[STEP q + (offset, *OFFSETS) + t]) for t < TAPS).

    Products are accumulated in float32, up to BLOCK_K of a sum in one instruction's. Every element of a load
    has its own mask.
    """
    # For every output row q of the march, with k = ((kd * TAPS[1] + kh) * TAPS[2] + kw) * C + c:
    #   acc = sum over blocks of k of a(x[STEP q + (offset, *OFFSETS) + (kd, kh, kw), c]) w[k]
    #   out[q] = epilogue(acc)
    COLUMNS: tl.constexpr = CHANNEL_BLOCKS * BLOCK_N
    DEPTH: tl.constexpr = TAPS[0] * TAPS[1] * TAPS[2] * C
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    n = tl.program_id(1)
    tile = tile_of(rows, height, width, CHANNEL_BLOCKS, BLOCK_D, BLOCK_H, BLOCK_W, BLOCK_N)
    offsets = (tile.vh * width + tile.vw)[:, None] * CHANNELS + tile.column[None, :]  # [BLOCK_M, BLOCK_N]
    h_first = tile.vh * STEP[1] + OFFSETS[0]  # [BLOCK_M]
    w_first = tile.vw * STEP[2] + OFFSETS[1]  # [BLOCK_M]
    ending = ending_of(
        partial_ptr, bias_ptr, bias_ptr, bias_ptr, bias_ptr, n, tile.index, tiles, COLUMNS, EPILOGUE
    )
    first, second = empty_sums(BLOCK_H * BLOCK_W, BLOCK_N, PER_PLACE)
    for q in range(tile.first_row, tile.end_row):
        acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
        d_first = q * STEP[0] + offset
        plane_ptr = plane_base(x_ptr, n, d_first, x_stride, H * W, C)
        for start in tl.static_range(0, DEPTH, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            tap = k // C
            kd = tap // (TAPS[1] * TAPS[2])
            h = h_first[:, None] + (tap // TAPS[2] % TAPS[1])[None, :]  # [BLOCK_M, BLOCK_K]
            w = w_first[:, None] + (tap % TAPS[2])[None, :]  # [BLOCK_M, BLOCK_K]
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
            weight = tl.load(w_ptr + k[:, None] * COLUMNS + tile.column[None, :])
            acc = tl.dot(a, weight, acc, input_precision=PRECISION)
        first, second = store_plane(
            acc, first, second, q - tile.first_row, tile, ending, offsets,
            plane_base(out_ptr, n, q, out_stride, height * width, CHANNELS), out_ptr,
            CHANNELS, COLUMNS, EPILOGUE, HAS_BIAS, 1.0, BLOCK_N, PER_PLACE,
        )  # fmt: skip
    store_sums(first, second, tile, ending, COLUMNS, EPILOGUE, PER_PLACE)
