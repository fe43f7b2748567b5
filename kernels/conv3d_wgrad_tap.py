"""The weight gradient of any convolution: taps and input channels flattened into the product's first axis."""

import triton.language as tl

from effseg.kernels.common import kernel, operand
from effseg.kernels.conv3d_wgrad_loops import folded, plane_size, terms_of, within


@kernel
def tap(
    x_ptr,  # [samples, rows, H, W, CI]
    grad_ptr, y_ptr, out_ptr,  # [samples, out_rows, out_H, out_W, CO]
    scale_ptr, shift_ptr,  # [samples, CI]
    fold_scale_ptr, fold_shift_ptr,  # [samples, CO]
    partial_ptr,  # [splits, KD * KH * KW * CI, CO]
    x_stride, grad_stride, y_stride, out_stride,
    samples, rows, out_rows, H, W, out_H, out_W, front, splits,
    CI: tl.constexpr, CO: tl.constexpr, GROUP: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PROLOGUE: tl.constexpr, FOLD: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Any window: the axis M is (kd, kh, kw, ci) flattened, cut into blocks, so that narrow inputs fill the
    tensor core and the channels of neighbours along W are read in one piece. The contraction runs over tiles
    of BLOCK_H x BLOCK_W output voxels, a split's being consecutive.

    GROUP: a power of two that divides CI; what is computed for a tap is computed once a group.
    Grid: (blocks of M times blocks of CO, splits). The programs of the first block of M write the folded
    gradient.
    """
    # For every tile of BLOCK_H x BLOCK_W output voxels o of the split, with m = (kd, kh, kw, ci):
    #   g = grad[o, co], or what FOLD makes of it
    #   acc[m, co] += sum over o of a(x[STRIDE o + (kd, kh, kw) - padding, ci]) g[o, co]
    TYPE: tl.constexpr = grad_ptr.dtype.element_ty
    ROWS_M: tl.constexpr = KD * KH * KW * CI
    BLOCKS_M: tl.constexpr = (ROWS_M + BLOCK_M - 1) // BLOCK_M
    block = tl.program_id(0)
    split = tl.program_id(1)
    m = block % BLOCKS_M * BLOCK_M + tl.arange(0, BLOCK_M)
    # Past the end the last tap is read again; those rows are not stored.
    taps = tl.minimum(m // GROUP // (CI // GROUP), KD * KH * KW - 1)
    ci = m // GROUP % (CI // GROUP) * GROUP + m % GROUP
    kd = (taps // (KH * KW))[None, :] - front
    kh = (taps // KW % KH)[None, :] - KH // 2
    kw = (taps % KW)[None, :] - KW // 2
    co = block // BLOCKS_M * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.arange(0, BLOCK_H * BLOCK_W)
    v_h = (v // BLOCK_W)[:, None]
    v_w = (v % BLOCK_W)[:, None]
    x_offsets = kd * plane_size(H, W, CI) + (kh * W + kw) * CI + ci[None, :]  # [1, BLOCK_M]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tiles_h = tl.cdiv(out_H, BLOCK_H)
    tiles_w = tl.cdiv(out_W, BLOCK_W)
    tiles = samples * out_rows * tiles_h * tiles_w
    share = tl.cdiv(tiles, splits)
    first = split * share
    # Counters in place of divisions, which would cost more than the tile's loads.
    tile_w = first % tiles_w
    tile_h = first // tiles_w % tiles_h
    out_row = first // (tiles_w * tiles_h) % out_rows
    n = first // (tiles_w * tiles_h * out_rows)
    for _ in range(first, tl.minimum(first + share, tiles)):
        sample = tl.zeros((), tl.int64) + n
        row = tl.zeros((), tl.int64) + out_row
        h = tile_h * BLOCK_H + v_h
        w = tile_w * BLOCK_W + v_w
        ok = (h < out_H) & (w < out_W)
        g_ok = ok & (co < CO)[None, :]
        plane = row * plane_size(out_H, out_W, CO)
        offsets = (h * out_W + w) * CO + co[None, :]
        g = tl.load(grad_ptr + (sample * grad_stride * CO + plane) + offsets, mask=g_ok, other=0.0)
        if FOLD:
            f_scale, f_shift = terms_of(fold_scale_ptr, fold_shift_ptr, sample, co, CO, True, True)
            y = tl.load(y_ptr + (sample * y_stride * CO + plane) + offsets, mask=g_ok, other=0.0)
            g = tl.where(g_ok, folded(g, y, f_scale, f_shift), 0.0)
            if block % BLOCKS_M == 0:
                tl.store(out_ptr + (sample * out_stride * CO + plane) + offsets, g, mask=g_ok)
        x_h = h * STRIDE_H + kh
        x_w = w * STRIDE_W + kw
        x_d = out_row * STRIDE_D + kd
        x_ok = within(x_h, tl.where(within(x_d, rows), H, 0)) & within(x_w, W)
        origin = x_ptr + (sample * x_stride * CI + row * STRIDE_D * plane_size(H, W, CI))
        pointers = origin + x_offsets + (h * STRIDE_H * W + w * STRIDE_W) * CI
        scale, shift = terms_of(scale_ptr, shift_ptr, sample, ci, CI, PROLOGUE, False)
        a = operand(tl.load(pointers, mask=x_ok, other=0.0), scale, shift, TYPE, PROLOGUE, SLOPE)
        if PROLOGUE:
            a = tl.where(x_ok, a, 0.0)
        acc = tl.dot(tl.trans(a), g, acc, input_precision=PRECISION)
        tile_w += 1
        next_h = tile_w == tiles_w
        tile_w = tl.where(next_h, 0, tile_w)
        tile_h += tl.where(next_h, 1, 0)
        next_row = tile_h == tiles_h
        tile_h = tl.where(next_row, 0, tile_h)
        out_row += tl.where(next_row, 1, 0)
        next_sample = out_row == out_rows
        out_row = tl.where(next_sample, 0, out_row)
        n += tl.where(next_sample, 1, 0)
    target = partial_ptr + split.to(tl.int64) * (ROWS_M * CO) + m[:, None] * CO + co[None, :]
    tl.store(target, acc, mask=(m < ROWS_M)[:, None] & (co < CO)[None, :])
