"""The main loops of a convolution: what forward, stride-1 dgrad and a parity class of strided dgrad share.

All three are out[SPREAD q + CLASS] = epilogue(sum over taps t and channels of a(x[STEP q + offset + t]) w[t])
for q < (rows, height, width), where what is outside x counts as zero; only positions, the layout of the
weights and the epilogue tell forward and dgrad apart, and the host decides on those.

========== ====================================== ========================================================
loop       for                                    how
========== ====================================== ========================================================
slide      3x3x3, step 1, C <= 64                 marches along D: a tile of input is read and activated
                                                  9 times and not 27, feeding the three output rows it is in
tap        any                                    a loop over taps and blocks of channels
few        few channels and taps                  taps and channels together are the contraction's axis
========== ====================================== ========================================================

x (N, D, H, W, C), out (N, DO, HO, WO, CHANNELS) and y, of out's shape, as they are in memory. w: taps first,
then the contraction's axis padded to whole blocks with zeros, then columns = CHANNEL_BLOCKS * BLOCK_N.
pre_scale and pre_shift (N, padded C), float32: the prologue a = leaky_relu(x * scale + shift). bias
(columns,), mean, scale and beta (N, columns), float32, are the epilogue's, partial (N, tiles, vectors,
columns), float32, what it leaves. Products are accumulated in float32. turns: how many the inner loop takes
(3 rows of taps in `slide`, taps times blocks of channels in `tap`); if UNROLLED, the compiler knows and may
unroll, which saves instructions and takes registers. Grid: (tiles * CHANNEL_BLOCKS, N).
"""

import triton
import triton.language as tl

from effseg.kernels.common import kernel, leaky_relu
from effseg.kernels.conv3d_epilogue import (
    empty_sums,
    plane_base,
    store_plane,
    store_sums,
    tile_of,
    vectors,
    voxels_of,
)


@triton.jit
def operand(x, scale, shift, DTYPE: tl.constexpr, PROLOGUE: tl.constexpr, SLOPE: tl.constexpr):
    """a(x) in the type of the products; where a load is masked that is a(0), not zero."""
    if PROLOGUE:
        return leaky_relu(x.to(tl.float32) * scale + shift, SLOPE).to(DTYPE)
    elif x.dtype == DTYPE:
        return x
    else:
        return x.to(tl.float32).to(DTYPE)


@triton.jit
def slide_plane(
    acc0,
    acc1,
    acc2,
    plane_ptr,
    w_ptr,
    scale,
    shift,
    vh,
    vw,
    inner,
    weights,
    channels,
    turns,
    H,
    W,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    SLOPE: tl.constexpr,
    MASKED: tl.constexpr,
    UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds an input plane's share to the three output rows that read it.

    inner (BLOCK_M, BLOCK_K): element of tap (0, 0) in the plane; weights (BLOCK_K, BLOCK_N): element in one
    tap; channels (1, BLOCK_K): whether they exist, the only mask of what is not MASKED, and needed only
    where C is not BLOCK_K.
    """
    TAP: tl.constexpr = BLOCK_K * COLUMNS
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    for kh in range(3 if UNROLLED else turns):
        row_ptr = plane_ptr + kh * W * C
        for kw in tl.static_range(3):
            x_ptr = row_ptr + kw * C + inner
            if MASKED:
                h = vh + (kh - 1)
                w = vw + (kw - 1)
                exists = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
                x = tl.load(x_ptr, mask=exists if C == BLOCK_K else exists & channels, other=0)
            elif C == BLOCK_K:
                x = tl.load(x_ptr)
            else:
                x = tl.load(x_ptr, mask=channels, other=0)
            a = operand(x, scale, shift, dtype, PROLOGUE, SLOPE)
            if MASKED and PROLOGUE:
                a = tl.where(exists, a, 0.0)
            tap_ptr = w_ptr + (kh * 3 + kw) * TAP + weights
            acc2 = tl.dot(a, tl.load(tap_ptr), acc2, input_precision=PRECISION)
            acc1 = tl.dot(a, tl.load(tap_ptr + 9 * TAP), acc1, input_precision=PRECISION)
            acc0 = tl.dot(a, tl.load(tap_ptr + 18 * TAP), acc0, input_precision=PRECISION)
    return acc0, acc1, acc2


@kernel
def conv3d_slide_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    partial_ptr,
    pre_scale_ptr,
    pre_shift_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    x_stride,
    out_stride,
    y_stride,
    D,
    H,
    W,
    rows,
    offset,
    turns,
    tiles,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    SLOPE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    EPILOGUE_SLOPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_PLACE: tl.constexpr,
    UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output row q reads rows q + offset + (0, 1, 2); out is as high and wide as x. w (3, 3, 3, BLOCK_K,
    columns).

    Tiles whose neighbours all exist take a branch without masks.
    """
    COLUMNS: tl.constexpr = CHANNEL_BLOCKS * BLOCK_N
    n = tl.program_id(1)
    block, tile, first_row, end_row, h, w = tile_of(rows, H, W, CHANNEL_BLOCKS, BLOCK_D, BLOCK_H, BLOCK_W)
    vh, vw, inside, voxels = voxels_of(h, w, H, W, BLOCK_H, BLOCK_W)
    interior = (h > 0) & (w > 0) & (h + BLOCK_H < H) & (w + BLOCK_W < W)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    channels = (k < C)[None, :]
    if PROLOGUE:
        scale = tl.load(pre_scale_ptr + n * BLOCK_K + k)[None, :]
        shift = tl.load(pre_shift_ptr + n * BLOCK_K + k)[None, :]
    else:
        scale = 1.0
        shift = 0.0
    inner = ((vh - 1) * W + vw - 1)[:, None] * C + k[None, :]
    weights = k[:, None] * COLUMNS + column[None, :]
    offsets = (vh * W + vw)[:, None] * CHANNELS + column[None, :]
    terms = n * COLUMNS
    acc0 = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)  # output row q, complete after this plane
    acc1 = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)  # q + 1
    acc2 = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)  # q + 2
    row_ptr = plane_base(partial_ptr, n, tile, tiles, 1, vectors(EPILOGUE) * COLUMNS)
    first, second = empty_sums(BLOCK_H * BLOCK_W, BLOCK_N, PER_PLACE)
    for q in range(first_row - 2, end_row):
        d = q + 2 + offset
        if (d >= 0) & (d < D):
            plane_ptr = plane_base(x_ptr, n, d, x_stride, H * W, C)
            if interior:
                acc0, acc1, acc2 = slide_plane(
                    acc0, acc1, acc2, plane_ptr, w_ptr, scale, shift, vh, vw, inner, weights, channels,
                    turns, H, W, C, BLOCK_K, COLUMNS, PROLOGUE, SLOPE, False, UNROLLED, PRECISION,
                )  # fmt: skip
            else:
                acc0, acc1, acc2 = slide_plane(
                    acc0, acc1, acc2, plane_ptr, w_ptr, scale, shift, vh, vw, inner, weights, channels,
                    turns, H, W, C, BLOCK_K, COLUMNS, PROLOGUE, SLOPE, True, UNROLLED, PRECISION,
                )  # fmt: skip
        if q >= first_row:
            first, second = store_plane(
                acc0, first, second, q - first_row, voxels,
                plane_base(out_ptr, n, q, out_stride, H * W, CHANNELS),
                plane_base(y_ptr, n, q, y_stride, H * W, CHANNELS),
                row_ptr, bias_ptr, mean_ptr + terms, scale_ptr + terms, beta_ptr + terms, offsets, inside,
                column, CHANNELS, COLUMNS, EPILOGUE, HAS_BIAS, EPILOGUE_SLOPE, BLOCK_N, PER_PLACE,
            )  # fmt: skip
        acc0 = acc1
        acc1 = acc2
        acc2 = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
    store_sums(
        first, second, end_row - first_row, voxels, row_ptr, inside, column, COLUMNS, EPILOGUE, PER_PLACE
    )


@kernel
def conv3d_tap_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    partial_ptr,
    pre_scale_ptr,
    pre_shift_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    x_stride,
    out_stride,
    y_stride,
    D,
    H,
    W,
    rows,
    height,
    width,
    HO,
    WO,
    offset,
    parity,
    turns,
    tiles,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,
    TAPS: tl.constexpr,
    STEP: tl.constexpr,
    OFFSETS: tl.constexpr,
    SPREAD: tl.constexpr,
    CLASS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    SLOPE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    EPILOGUE_SLOPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_PLACE: tl.constexpr,
    UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[SPREAD q + (parity, *CLASS)] = sum of w[t] x[STEP q + (offset, *OFFSETS) + t] for t < TAPS.

    w (*TAPS, padded C, columns). Triples are per axis (D, H, W), OFFSETS and CLASS of H and W. Loads are
    masked along H and W, and in the channels where C is no multiple of BLOCK_K.
    """
    COLUMNS: tl.constexpr = CHANNEL_BLOCKS * BLOCK_N
    BLOCKS_K: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    n = tl.program_id(1)
    block, tile, first_row, end_row, h0, w0 = tile_of(
        rows, height, width, CHANNEL_BLOCKS, BLOCK_D, BLOCK_H, BLOCK_W
    )
    vh, vw, inside, voxels = voxels_of(h0, w0, height, width, BLOCK_H, BLOCK_W)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    h_first = vh * STEP[1] + OFFSETS[0]
    w_first = vw * STEP[2] + OFFSETS[1]
    weights = ks[:, None] * COLUMNS + column[None, :]
    offsets = (vh * SPREAD[1] + CLASS[0]) * WO + vw * SPREAD[2] + CLASS[1]
    offsets = offsets[:, None] * CHANNELS + column[None, :]
    terms = n * COLUMNS
    row_ptr = plane_base(partial_ptr, n, tile, tiles, 1, vectors(EPILOGUE) * COLUMNS)
    first, second = empty_sums(BLOCK_H * BLOCK_W, BLOCK_N, PER_PLACE)
    for q in range(first_row, end_row):
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
            acc, first, second, q - first_row, voxels,
            plane_base(out_ptr, n, row, out_stride, HO * WO, CHANNELS),
            plane_base(y_ptr, n, row, y_stride, HO * WO, CHANNELS),
            row_ptr, bias_ptr, mean_ptr + terms, scale_ptr + terms, beta_ptr + terms, offsets, inside, column,
            CHANNELS, COLUMNS, EPILOGUE, HAS_BIAS, EPILOGUE_SLOPE, BLOCK_N, PER_PLACE,
        )  # fmt: skip
    store_sums(
        first, second, end_row - first_row, voxels, row_ptr, inside, column, COLUMNS, EPILOGUE, PER_PLACE
    )
