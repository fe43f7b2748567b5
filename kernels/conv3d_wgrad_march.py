"""The weight gradient of 3x3x3 convolutions of stride 1: a march along D."""

from typing import NamedTuple

import triton
import triton.language as tl

from effseg.kernels.common import kernel, operand
from effseg.kernels.conv3d_wgrad_loops import folded, plane_size, terms_of, within


class Gradient(NamedTuple):
    """How a program reads its tile of rows of the gradient."""

    grad_ptr: tl.tensor  # the sample's first element, of y_ptr and out_ptr too
    y_ptr: tl.tensor
    out_ptr: tl.tensor
    offsets: tl.tensor  # [BLOCK_V, BLOCK_N], in the row
    h: tl.tensor  # [BLOCK_V, 1]
    w: tl.tensor  # [BLOCK_V, BLOCK_N], or [BLOCK_V, 1] where all columns are of one voxel
    channel: tl.tensor  # [1, BLOCK_N]
    scale: tl.tensor  # [1, BLOCK_N]
    shift: tl.tensor  # [1, BLOCK_N]
    inside: tl.tensor  # whether the tile and its neighbours are inside the plane
    owner: tl.tensor  # whether this program writes the folded gradient


@triton.jit
def march_input(
    pointers,  # [BLOCK_V, BLOCK_M]
    h, w,  # [BLOCK_V, 1], [BLOCK_V, BLOCK_M] or [BLOCK_V, 1]
    channel,  # [1, BLOCK_M]
    H, W,
    scale, shift,  # [1, BLOCK_M]
    inside,
    C: tl.constexpr, TYPE: tl.constexpr, PROLOGUE: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """The activated input of a tile, zero outside the volume; H is 0 if the row is outside.

    Tiles with registers to spend on the prologue branch, so that those inside neither mask the loads nor the
    activated values; they may then read the next voxel's channels in place of channels >= C.
    """
    if PROLOGUE:
        if inside & (H > 0):
            a = operand(tl.load(pointers), scale, shift, TYPE, True, SLOPE)
        else:
            ok = within(h, H) & within(w, W) & (channel < C)
            a = operand(tl.load(pointers, mask=ok), scale, shift, TYPE, True, SLOPE)
            a = tl.where(ok, a, 0.0)
        return a
    else:
        ok = within(h, H) & within(w, W) & (channel < C)
        return operand(tl.load(pointers, mask=ok, other=0.0), scale, shift, TYPE, False, SLOPE)


@triton.jit
def march_gradient(gradient, row, rows, H, W, C: tl.constexpr, FOLD: tl.constexpr, WRITE: tl.constexpr):
    """The folded gradient of a tile of `row`, [BLOCK_V, BLOCK_N], zero outside the volume; written by its
    owner where WRITE."""
    h, w, channel = gradient.h, gradient.w, gradient.channel
    row = tl.zeros((), tl.int64) + row
    start = row * plane_size(H, W, C)
    height = tl.where((row >= 0) & (row < rows), H, 0)
    pointers = gradient.grad_ptr + start + gradient.offsets
    if FOLD:
        scale, shift = gradient.scale, gradient.shift
        y_pointers = gradient.y_ptr + start + gradient.offsets
        out_pointers = gradient.out_ptr + start + gradient.offsets
        if gradient.inside & (height > 0):
            g = folded(tl.load(pointers), tl.load(y_pointers), scale, shift)
            if WRITE and gradient.owner:
                tl.store(out_pointers, g, mask=channel < C)
        else:
            ok = (h < height) & (w < W) & (channel < C)
            g = folded(tl.load(pointers, mask=ok), tl.load(y_pointers, mask=ok), scale, shift)
            g = tl.where(ok, g, 0.0)
            if WRITE and gradient.owner:
                tl.store(out_pointers, g, mask=ok)
        return g
    else:
        ok = (h < height) & (w < W) & (channel < C)
        return tl.load(pointers, mask=ok, other=0.0)


@kernel
def march(
    x_ptr,  # [samples, rows, H, W, CI]
    grad_ptr, y_ptr, out_ptr,  # [samples, out_rows, H, W, CO]
    scale_ptr, shift_ptr,  # [samples, CI]
    fold_scale_ptr, fold_shift_ptr,  # [samples, CO]
    partial_ptr,  # [splits, kh, kd, BLOCK_M, BLOCK_N], "kw" [splits, kh, kw, kd, BLOCK_M, BLOCK_N]
    x_stride, grad_stride, y_stride, out_stride,
    samples, rows, out_rows, H, W, front, segment, splits,
    CI: tl.constexpr, CO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOOP: tl.constexpr, PROLOGUE: tl.constexpr, FOLD: tl.constexpr, ROTATE: tl.constexpr,
    SLOPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """3x3x3, stride 1, marching along D with the gradient's last three rows, so that a row is read and folded
    once a program where ROTATE, and else three times (then loads go to shared memory without registers).

    LOOP "pair", "pair3": the contraction runs over pairs of neighbours along W, 2u and 2u + 1. Its operands
    are x[2u - 1 .. 2u + 2], 4 CI contiguous values, and g[2u], g[2u + 1], 2 CO contiguous values; their
    product holds the tap kw at [kw, 0] and [kw + 1, 1], and the sum of both is the gradient: 6 of its 8
    blocks are used, which is the price of M = 4 CI >= 64. CI, CO are powers of two.
    LOOP "kw": over voxels; M = BLOCK_M >= CI, N = BLOCK_N >= CO.
    BLOCK_W counts pairs or voxels. "pair" and "kw" have one value of kh a program, "pair3" all.

    Grid: (1 if "pair3" else 3, splits).
    """
    # For every step d of a tile's march, whose input row d - front meets the gradient's rows d, d - 1, d - 2:
    #   c[i, kd] += a(x[d - front, h + kh - 1, w + kw - 1])^T g[d - kd, h, w],  summed over the tile's (h, w)
    #   for kd = 0, 1, 2 and the taps i that a program has: of "pair3" i is kh, of "kw" kw, "pair" has one.
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
    # c_ij: i is kh in "pair3", kw in "kw", 0 in "pair"; j is kd. Of "pair" and "kw" kh is the group's.
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
        x_h = h if LOOP == "pair3" else h + (group - 1)
        x_w = w + (i // CI)[None, :] - 1 if PAIRS else w - 1
        x_offsets = (x_h * W + w - 1) * CI + i[None, :]
        scale, shift = terms_of(scale_ptr, shift_ptr, n, ci, CI, PROLOGUE, BLOCK_M > CI and not PAIRS)
        f_scale, f_shift = terms_of(
            fold_scale_ptr, fold_shift_ptr, n, co, CO, FOLD, BLOCK_N > CO and not PAIRS
        )
        gradient = Gradient(
            grad_ptr + n * grad_stride * CO, y_ptr + n * y_stride * CO, out_ptr + n * out_stride * CO,
            (h * W + w) * CO + j[None, :], h, g_w, co[None, :], f_scale, f_shift, inside, owner,
        )  # fmt: skip
        if ROTATE:
            g0 = march_gradient(gradient, start - 2, out_rows, H, W, CO, FOLD, 0)
            g1 = march_gradient(gradient, start - 1, out_rows, H, W, CO, FOLD, 0)
        for step in range(start, tl.minimum(start + segment, steps)):
            g2 = march_gradient(gradient, step, out_rows, H, W, CO, FOLD, 1)
            if not ROTATE:
                g1 = march_gradient(gradient, step - 1, out_rows, H, W, CO, FOLD, 0)
                g0 = march_gradient(gradient, step - 2, out_rows, H, W, CO, FOLD, 0)
            row = tl.zeros((), tl.int64) + step - front
            height = tl.where((row >= 0) & (row < rows), H, 0)
            x_row = x_ptr + (n * x_stride * CI + row * plane_size(H, W, CI))
            for tap in tl.static_range(1 if LOOP == "pair" else 3):
                dh = tap - 1 if LOOP == "pair3" else 0
                dw = tap if LOOP == "kw" else 0
                pointers = x_row + (dh * W + dw) * CI + x_offsets
                a = march_input(
                    pointers, x_h + dh, x_w + dw, ci[None, :], height, W, scale, shift, inside,
                    CI, TYPE, PROLOGUE, SLOPE,
                )  # fmt: skip
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
