"""The weight gradient's main loops: products of input and gradient, summed over voxels in float32.

Both write one partial row a split, whole: a split without work writes zeros. Features are channels last;
samples are x_stride and the like voxels apart. Common arguments:

x_ptr                           (samples, rows, H, W, CI), of any type, converted to grad's as it is read
grad_ptr, y_ptr, out_ptr        (samples, out_rows, out_H, out_W, CO)
scale_ptr, shift_ptr            (samples, CI) float32; PROLOGUE: x stands for leaky_relu(x * scale + shift,
                                SLOPE), zero outside x
fold_scale_ptr, fold_shift_ptr  (samples, CO) float32; FOLD: the gradient is grad + y * scale + shift, rounded
                                to grad's type and written to out_ptr
front                           input row = stride * output row + tap - front
"""

import triton
import triton.language as tl

from effseg.kernels.common import kernel, leaky_relu


@triton.jit
def _within(index, size):
    """0 <= index < size, in one comparison of unsigned numbers."""
    size = (tl.zeros((), tl.int32) + size).to(tl.uint32, bitcast=True)
    return index.to(tl.uint32, bitcast=True) < size


@triton.jit
def _plane(H, W, C: tl.constexpr):
    """Elements of a row of the volume, 64-bit."""
    return (tl.zeros((), tl.int64) + H) * W * C


@triton.jit
def _terms(scale_ptr, shift_ptr, n, channel, C: tl.constexpr, USED: tl.constexpr, MASKED: tl.constexpr):
    """(scale, shift) of sample n, each (1, channels); zeros where channel >= C, and if not USED."""
    if USED:
        offset = n * C + channel
        if MASKED:
            scale = tl.load(scale_ptr + offset, mask=channel < C, other=0.0)
            shift = tl.load(shift_ptr + offset, mask=channel < C, other=0.0)
        else:
            scale = tl.load(scale_ptr + offset)
            shift = tl.load(shift_ptr + offset)
        return scale[None, :], shift[None, :]
    else:
        return 0.0, 0.0


@triton.jit
def _activated(x, terms, TYPE: tl.constexpr, PROLOGUE: tl.constexpr, SLOPE: tl.constexpr):
    if PROLOGUE:
        return leaky_relu(x.to(tl.float32) * terms[0] + terms[1], SLOPE).to(TYPE)
    elif x.dtype == TYPE:
        return x
    else:
        return x.to(tl.float32).to(TYPE)


@triton.jit
def _folded(grad, y, terms):
    return (grad.to(tl.float32) + (y.to(tl.float32) * terms[0] + terms[1])).to(grad.dtype)


@triton.jit
def _march_input(pointers, h, w, channel, H, W, terms, inside,
                 C: tl.constexpr, TYPE: tl.constexpr, PROLOGUE: tl.constexpr,
                 SLOPE: tl.constexpr):  # fmt: skip
    """The activated input of a tile, zero outside the volume; H is 0 if the row is outside.

    Tiles with registers to spend on the prologue branch, so that those inside neither mask the loads nor the
    activated values; they may then read the next voxel's channels in place of channels >= C.
    """
    if PROLOGUE:
        if inside & (H > 0):
            a = _activated(tl.load(pointers), terms, TYPE, True, SLOPE)
        else:
            ok = _within(h, H) & _within(w, W) & (channel < C)
            a = tl.where(ok, _activated(tl.load(pointers, mask=ok), terms, TYPE, True, SLOPE), 0.0)
        return a
    else:
        ok = _within(h, H) & _within(w, W) & (channel < C)
        return _activated(tl.load(pointers, mask=ok, other=0.0), terms, TYPE, False, SLOPE)


@triton.jit
def _march_gradient(bases, row, rows, tile, H, W, terms, inside, owner,
                    C: tl.constexpr, FOLD: tl.constexpr, WRITE: tl.constexpr):  # fmt: skip
    """The folded gradient of a tile of `row`, zero outside the volume; written by `owner` where WRITE.

    bases: the sample's first element in grad, y and out; tile: (offsets in the row, h, w, channel).
    """
    offsets, h, w, channel = tile
    row = tl.zeros((), tl.int64) + row
    start = row * _plane(H, W, C)
    height = tl.where((row >= 0) & (row < rows), H, 0)
    pointers = bases[0] + start + offsets
    if FOLD:
        y_pointers = bases[1] + start + offsets
        out_pointers = bases[2] + start + offsets
        if inside & (height > 0):
            g = _folded(tl.load(pointers), tl.load(y_pointers), terms)
            if WRITE and owner:
                tl.store(out_pointers, g, mask=channel < C)
        else:
            ok = (h < height) & (w < W) & (channel < C)
            g = tl.where(ok, _folded(tl.load(pointers, mask=ok), tl.load(y_pointers, mask=ok), terms), 0.0)
            if WRITE and owner:
                tl.store(out_pointers, g, mask=ok)
        return g
    else:
        ok = (h < height) & (w < W) & (channel < C)
        return tl.load(pointers, mask=ok, other=0.0)


@kernel
def march(x_ptr, grad_ptr, y_ptr, out_ptr, scale_ptr, shift_ptr, fold_scale_ptr, fold_shift_ptr, partial_ptr,
          x_stride, grad_stride, y_stride, out_stride, samples, rows, out_rows, H, W, front, segment, splits,
          CI: tl.constexpr, CO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          LOOP: tl.constexpr, PROLOGUE: tl.constexpr, FOLD: tl.constexpr, ROTATE: tl.constexpr,
          SLOPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """3x3x3, stride 1, marching along D with the gradient's last three rows, so that a row is read and folded
    once a program where ROTATE, and else three times (then loads go to shared memory without registers).

    LOOP "pair", "pair3": the contraction runs over pairs of neighbours along W, 2u and 2u + 1. Its operands
    are x[2u - 1 .. 2u + 2], 4 CI contiguous values, and g[2u], g[2u + 1], 2 CO contiguous values; their
    product holds the tap kw at [kw, 0] and [kw + 1, 1], and the sum of both is the gradient: 6 of its 8
    blocks are used, which is the price of M = 4 CI >= 64. CI, CO are powers of two.
    LOOP "kw": over voxels; M = BLOCK_M >= CI, N = BLOCK_N >= CO.
    BLOCK_W counts pairs or voxels. "pair" and "kw" have one value of kh a program, "pair3" all.

    grid (1 if "pair3" else 3, splits); partial (splits, kh, kd, BLOCK_M, BLOCK_N) "pair", "pair3", and
    (splits, kh, kw, kd, BLOCK_M, BLOCK_N) "kw".
    """
    PAIRS: tl.constexpr = LOOP != "kw"
    VOXELS: tl.constexpr = 2 if PAIRS else 1
    TYPE: tl.constexpr = grad_ptr.dtype.element_ty
    group = tl.program_id(0)
    split = tl.program_id(1)
    owner = (group == 1) | (LOOP == "pair3")
    tiles_h = tl.cdiv(H, BLOCK_H)
    tiles_w = tl.cdiv(W, BLOCK_W * VOXELS)
    # The last rows of x meet the gradient's last row two steps after that was read.
    steps = out_rows + 2
    segments = tl.cdiv(steps, segment)
    k = tl.arange(0, BLOCK_H * BLOCK_W)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    ci = i % CI if PAIRS else i
    co = j % CO if PAIRS else j
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c00, c01, c02, c10, c11, c12, c20, c21, c22 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for tile in range(split, samples * segments * tiles_h * tiles_w, splits):
        first_w = tile % tiles_w * (BLOCK_W * VOXELS)
        first_h = tile // tiles_w % tiles_h * BLOCK_H
        start = tile // (tiles_w * tiles_h) % segments * segment
        n = tl.zeros((), tl.int64) + tile // (tiles_w * tiles_h * segments)
        inside = (first_h > 0) & (first_w > 0) & (first_h + BLOCK_H < H) & (first_w + BLOCK_W * VOXELS < W)
        h = (first_h + k // BLOCK_W)[:, None]
        w = (first_w + k % BLOCK_W * VOXELS)[:, None]
        g_w = w + (j // CO)[None, :] if PAIRS else w
        g_tile = ((h * W + w) * CO + j[None, :], h, g_w, co[None, :])
        x_h = h if LOOP == "pair3" else h + (group - 1)
        x_w = w + (i // CI)[None, :] - 1 if PAIRS else w - 1
        x_offsets = (x_h * W + w - 1) * CI + i[None, :]
        terms = _terms(scale_ptr, shift_ptr, n, ci, CI, PROLOGUE, BLOCK_M > CI and not PAIRS)
        f_terms = _terms(fold_scale_ptr, fold_shift_ptr, n, co, CO, FOLD, BLOCK_N > CO and not PAIRS)
        bases = (
            grad_ptr + n * grad_stride * CO, y_ptr + n * y_stride * CO, out_ptr + n * out_stride * CO,
        )  # fmt: skip
        if ROTATE:
            g0 = _march_gradient(
                bases, start - 2, out_rows, g_tile, H, W, f_terms, inside, owner, CO, FOLD, 0
            )
            g1 = _march_gradient(
                bases, start - 1, out_rows, g_tile, H, W, f_terms, inside, owner, CO, FOLD, 0
            )
        for step in range(start, tl.minimum(start + segment, steps)):
            g2 = _march_gradient(bases, step, out_rows, g_tile, H, W, f_terms, inside, owner, CO, FOLD, 1)
            if not ROTATE:
                g1 = _march_gradient(
                    bases, step - 1, out_rows, g_tile, H, W, f_terms, inside, owner, CO, FOLD, 0
                )
                g0 = _march_gradient(
                    bases, step - 2, out_rows, g_tile, H, W, f_terms, inside, owner, CO, FOLD, 0
                )
            row = tl.zeros((), tl.int64) + step - front
            height = tl.where((row >= 0) & (row < rows), H, 0)
            x_row = x_ptr + (n * x_stride * CI + row * _plane(H, W, CI))
            for tap in tl.static_range(1 if LOOP == "pair" else 3):
                dh = tap - 1 if LOOP == "pair3" else 0
                dw = tap if LOOP == "kw" else 0
                pointers = x_row + (dh * W + dw) * CI + x_offsets
                a = _march_input(pointers, x_h + dh, x_w + dw, ci[None, :], height, W, terms, inside,
                                 CI, TYPE, PROLOGUE, SLOPE)  # fmt: skip
                a = tl.trans(a)
                if tap == 0:
                    c00 = tl.dot(a, g2, c00, input_precision=PRECISION)
                    c01 = tl.dot(a, g1, c01, input_precision=PRECISION)
                    c02 = tl.dot(a, g0, c02, input_precision=PRECISION)
                elif tap == 1:
                    c10 = tl.dot(a, g2, c10, input_precision=PRECISION)
                    c11 = tl.dot(a, g1, c11, input_precision=PRECISION)
                    c12 = tl.dot(a, g0, c12, input_precision=PRECISION)
                else:
                    c20 = tl.dot(a, g2, c20, input_precision=PRECISION)
                    c21 = tl.dot(a, g1, c21, input_precision=PRECISION)
                    c22 = tl.dot(a, g0, c22, input_precision=PRECISION)
            if ROTATE:
                g0 = g1
                g1 = g2
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    TAPS: tl.constexpr = 1 if LOOP == "pair" else 3
    cell = (split * tl.num_programs(0) + group).to(tl.int64) * (TAPS * 3 * SIZE)
    target = partial_ptr + cell + i[:, None] * BLOCK_N + j[None, :]
    tl.store(target, c00)
    tl.store(target + SIZE, c01)
    tl.store(target + 2 * SIZE, c02)
    if LOOP != "pair":
        tl.store(target + 3 * SIZE, c10)
        tl.store(target + 4 * SIZE, c11)
        tl.store(target + 5 * SIZE, c12)
        tl.store(target + 6 * SIZE, c20)
        tl.store(target + 7 * SIZE, c21)
        tl.store(target + 8 * SIZE, c22)


@kernel
def tap(x_ptr, grad_ptr, y_ptr, out_ptr, scale_ptr, shift_ptr, fold_scale_ptr, fold_shift_ptr, partial_ptr,
        x_stride, grad_stride, y_stride, out_stride, samples, rows, out_rows, H, W, out_H, out_W, front,
        splits, CI: tl.constexpr, CO: tl.constexpr, GROUP: tl.constexpr,
        KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
        STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
        PROLOGUE: tl.constexpr, FOLD: tl.constexpr, SLOPE: tl.constexpr,
        BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        PRECISION: tl.constexpr):  # fmt: skip
    """Any window: the axis M is (kd, kh, kw, ci) flattened, cut into blocks, so that narrow inputs fill the
    tensor core and the channels of neighbours along W are read in one piece. The contraction runs over tiles
    of BLOCK_H x BLOCK_W output voxels, a split's being consecutive.

    GROUP: a power of two that divides CI; what is computed for a tap is computed once a group.
    grid (blocks of M times blocks of CO, splits); partial (splits, KD * KH * KW * CI, CO). The programs of
    the first block of M write the folded gradient.
    """
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
    x_offsets = kd * _plane(H, W, CI) + (kh * W + kw) * CI + ci[None, :]
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
        plane = row * _plane(out_H, out_W, CO)
        offsets = (h * out_W + w) * CO + co[None, :]
        g = tl.load(grad_ptr + (sample * grad_stride * CO + plane) + offsets, mask=g_ok, other=0.0)
        if FOLD:
            f_terms = _terms(fold_scale_ptr, fold_shift_ptr, sample, co, CO, True, True)
            y = tl.load(y_ptr + (sample * y_stride * CO + plane) + offsets, mask=g_ok, other=0.0)
            g = tl.where(g_ok, _folded(g, y, f_terms), 0.0)
            if block % BLOCKS_M == 0:
                tl.store(out_ptr + (sample * out_stride * CO + plane) + offsets, g, mask=g_ok)
        x_h = h * STRIDE_H + kh
        x_w = w * STRIDE_W + kw
        x_d = out_row * STRIDE_D + kd
        x_ok = _within(x_h, tl.where(_within(x_d, rows), H, 0)) & _within(x_w, W)
        origin = x_ptr + (sample * x_stride * CI + row * STRIDE_D * _plane(H, W, CI))
        pointers = origin + x_offsets + (h * STRIDE_H * W + w * STRIDE_W) * CI
        terms = _terms(scale_ptr, shift_ptr, sample, ci, CI, PROLOGUE, False)
        a = _activated(tl.load(pointers, mask=x_ok, other=0.0), terms, TYPE, PROLOGUE, SLOPE)
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
