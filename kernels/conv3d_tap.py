"""The main loop of any convolution: over taps and blocks of channels."""

import triton.language as tl

from effseg.kernels.common import kernel, operand
from effseg.kernels.conv3d_epilogue import empty_sums, ending_of, store_plane, store_sums
from effseg.kernels.conv3d_loops import plane_base, tile_of


@kernel
def conv3d_tap_kernel(
    x_ptr,  # [N, D, H, W, C]
    w_ptr,  # [*TAPS, BLOCKS_K * BLOCK_K, COLUMNS]
    out_ptr,  # [N, DO, HO, WO, CHANNELS]
    partial_ptr,  # [N, tiles, vectors, COLUMNS]
    pre_scale_ptr, pre_shift_ptr,  # [N, BLOCKS_K * BLOCK_K]
    bias_ptr,  # [COLUMNS]
    y_ptr,  # [N, DO, HO, WO, CHANNELS]
    mean_ptr, scale_ptr, beta_ptr,  # [N, COLUMNS]
    x_stride, out_stride, y_stride,
    D, H, W, rows, height, width, HO, WO, offset, parity, turns, tiles,
    C: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
    TAPS: tl.constexpr, STEP: tl.constexpr, OFFSETS: tl.constexpr,
    SPREAD: tl.constexpr, CLASS: tl.constexpr,
    PROLOGUE: tl.constexpr, SLOPE: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE_SLOPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_PLACE: tl.constexpr, UNROLLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[SPREAD q + (parity, *CLASS)] = sum of w[t] a(x[STEP q + (offset, *OFFSETS) + t]) for t < TAPS.

    Triples are per axis (D, H, W), OFFSETS and CLASS of H and W. Loads are masked along H and W, and in the
    channels where C is no multiple of BLOCK_K.
    """
    # For every output row q < rows of the march:
    #   acc = sum over taps (kd, kh, kw) and blocks of channels of
    #         a(x[STEP q + (offset, *OFFSETS) + (kd, kh, kw), block]) w[kd, kh, kw, block]
    #   out[SPREAD q + (parity, *CLASS)] = epilogue(acc)
    COLUMNS: tl.constexpr = CHANNEL_BLOCKS * BLOCK_N
    BLOCKS_K: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    n = tl.program_id(1)
    tile = tile_of(rows, height, width, CHANNEL_BLOCKS, BLOCK_D, BLOCK_H, BLOCK_W, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    h_first = tile.vh * STEP[1] + OFFSETS[0]  # [BLOCK_M]
    w_first = tile.vw * STEP[2] + OFFSETS[1]  # [BLOCK_M]
    weights = ks[:, None] * COLUMNS + tile.column[None, :]  # [BLOCK_K, BLOCK_N]
    offsets = (tile.vh * SPREAD[1] + CLASS[0]) * WO + tile.vw * SPREAD[2] + CLASS[1]
    offsets = offsets[:, None] * CHANNELS + tile.column[None, :]  # [BLOCK_M, BLOCK_N]
    ending = ending_of(
        partial_ptr, bias_ptr, mean_ptr, scale_ptr, beta_ptr, n, tile.index, tiles, COLUMNS, EPILOGUE
    )
    first, second = empty_sums(BLOCK_H * BLOCK_W, BLOCK_N, PER_PLACE)
    for q in range(tile.first_row, tile.end_row):
        acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
        for t in range(TAPS[0] * TAPS[1] * TAPS[2] * BLOCKS_K if UNROLLED else turns):
            k = t % BLOCKS_K * BLOCK_K + ks
            tap = t // BLOCKS_K
            d = q * STEP[0] + offset + tap // (TAPS[1] * TAPS[2])
            h = h_first + tap // TAPS[2] % TAPS[1]
            w = w_first + tap % TAPS[2]
            h_end = tl.where((d >= 0) & (d < D), H, 0)  # masks every voxel of a row outside
            exists = ((h >= 0) & (h < h_end) & (w >= 0) & (w < W))[:, None]
            mask = exists
            if C % BLOCK_K != 0:
                mask = mask & (k < C)[None, :]
            plane_ptr = plane_base(x_ptr, n, d, x_stride, H * W, C)
            x = tl.load(plane_ptr + (h * W + w)[:, None] * C + k[None, :], mask=mask, other=0)
            scale = 1.0
            shift = 0.0
            if PROLOGUE:
                scale = tl.load(pre_scale_ptr + n * (BLOCKS_K * BLOCK_K) + k)[None, :]
                shift = tl.load(pre_shift_ptr + n * (BLOCKS_K * BLOCK_K) + k)[None, :]
            a = operand(x, scale, shift, dtype, PROLOGUE, SLOPE)
            if PROLOGUE:
                a = tl.where(exists, a, 0.0)
            weight = tl.load(w_ptr + t * (BLOCK_K * COLUMNS) + weights)
            acc = tl.dot(a, weight, acc, input_precision=PRECISION)
        row = q * SPREAD[0] + parity
        first, second = store_plane(
            acc, first, second, q - tile.first_row, tile, ending, offsets,
            plane_base(out_ptr, n, row, out_stride, HO * WO, CHANNELS),
            plane_base(y_ptr, n, row, y_stride, HO * WO, CHANNELS),
            CHANNELS, COLUMNS, EPILOGUE, HAS_BIAS, EPILOGUE_SLOPE, BLOCK_N, PER_PLACE,
        )  # fmt: skip
    store_sums(first, second, tile, ending, COLUMNS, EPILOGUE, PER_PLACE)
