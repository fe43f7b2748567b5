"""Device code of trilinear upsampling x2 (align_corners=False) and its transpose; arithmetic in float32,
rounded once.

Both are tiled by cells: cell i of an axis lies between coarse voxels i - 1 and i, and holds fine ones 2i - 1
and 2i, a quarter and three quarters of the way. Eight reads make the eight fine voxels of a cell. Coarse
indices are clamped, which at the borders gives the coarse voxel itself. An axis of factor 1 is copied: cell,
coarse and fine voxel i are the same. BLOCK_M = BLOCK_H * BLOCK_W.
"""

import triton
import triton.language as tl

from effseg.kernels.common import kernel


@triton.jit
def _position(tiles_w, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """h, w [BLOCK_M, 1] and channels [1, BLOCK_C] of the program's tile of a plane."""
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    channels = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.program_id(0) // CHANNEL_BLOCKS
    place = tl.arange(0, BLOCK_H * BLOCK_W)
    h = tile // tiles_w * BLOCK_H + place // BLOCK_W
    w = tile % tiles_w * BLOCK_W + place % BLOCK_W
    return h[:, None], w[:, None], channels[None, :]


@triton.jit
def _plane_address(n, d, stride, h, w, C: tl.constexpr):
    """Offset of plane d of h w voxels in a tensor whose samples are `stride` voxels apart; scalar, int64."""
    return n.to(tl.int64) * stride * C + (tl.zeros((), tl.int64) + d) * h * w * C


@triton.jit
def _with_channels(inside, channels, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """A mask of places, and of channels where the last block has too many."""
    if C % BLOCK_C == 0:
        return inside
    else:
        return inside & (channels < C)


@triton.jit
def _between(low, high):
    """A quarter and three quarters of the way; low itself where high is low."""
    quarter = (high - low) * 0.25
    return low + quarter, high - quarter


@triton.jit
def _neighbours(cell, size, FACTOR: tl.constexpr):
    """The coarse indices on both sides of a cell, clamped to [0, size)."""
    if FACTOR == 2:
        return tl.minimum(tl.maximum(cell - 1, 0), size - 1), tl.minimum(cell, size - 1)
    else:
        return tl.minimum(cell, size - 1), tl.minimum(cell, size - 1)


@triton.jit
def _fine_line(x_ptr, row, w_low, w_high, channels, C: tl.constexpr, FACTOR_W: tl.constexpr):
    """The two fine voxels of a cell of the row at offset `row`, float32; the same one twice for factor 1."""
    mask = channels < C
    low = tl.load(x_ptr + (row + w_low * C + channels), mask=mask).to(tl.float32)
    if FACTOR_W == 1:
        return low, low
    else:
        return _between(low, tl.load(x_ptr + (row + w_high * C + channels), mask=mask).to(tl.float32))


@triton.jit
def _fine_plane(
    x_ptr, h_low, h_high, w_low, w_high, channels, coarse_w,
    C: tl.constexpr, FACTOR_H: tl.constexpr, FACTOR_W: tl.constexpr,
):  # fmt: skip
    """The four fine voxels of a cell of a coarse plane, h first: (00, 01, 10, 11)."""
    low0, low1 = _fine_line(x_ptr, h_low * coarse_w * C, w_low, w_high, channels, C, FACTOR_W)
    if FACTOR_H == 1:
        return low0, low1, low0, low1
    else:
        high0, high1 = _fine_line(x_ptr, h_high * coarse_w * C, w_low, w_high, channels, C, FACTOR_W)
        first0, second0 = _between(low0, high0)
        first1, second1 = _between(low1, high1)
        return first0, first1, second0, second1


@triton.jit
def _store(
    value, out_ptr, addend_ptr, n, d, exists, h, w, channels, height, width, out_stride, addend_stride,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[n, d, h, w] = value + addend[n, d, h, w] where d exists and (h, w) is inside of height x width."""
    limit = tl.where(exists, height, 0)
    mask = _with_channels((h >= 0) & (h < limit) & (w >= 0) & (w < width), channels, C, BLOCK_C)
    offsets = (h * width + w) * C + channels
    if addend_ptr is not None:
        addend = addend_ptr + _plane_address(n, d, addend_stride, height, width, C)
        value += tl.load(addend + offsets, mask=mask, other=0.0)
    out = out_ptr + _plane_address(n, d, out_stride, height, width, C)
    tl.store(out + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


@kernel
def _upsample_kernel(
    x_ptr,  # [N, coarse_d, coarse_h, coarse_w, C]
    addend_ptr, out_ptr,  # [N, rows, height, width, C]; addend may be None
    coarse_d, coarse_h, coarse_w, first_row, rows, height, width, tiles_w,
    x_stride, addend_stride, out_stride,
    FACTOR_D: tl.constexpr, FACTOR_H: tl.constexpr, FACTOR_W: tl.constexpr,
    C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = upsample(x) + addend, the fine rows from first_row on; BLOCK_H x BLOCK_W cells of one plane.

    Samples are *_stride voxels apart. Reads are clamped, and masked in the channels only; writes are masked
    in all axes.
    """
    # Of a cell, between coarse voxels i - 1 and i along every axis of factor 2:
    #   fine_{2i - 1} = 3/4 x_{i - 1} + 1/4 x_i;   fine_{2i} = 1/4 x_{i - 1} + 3/4 x_i   (W, then H, then D)
    #   out = fine + addend
    h, w, channels = _position(tiles_w, C, BLOCK_H, BLOCK_W, BLOCK_C)
    n = tl.program_id(2)
    d = (first_row + FACTOR_D - 1) // FACTOR_D + tl.program_id(1)
    h_low, h_high = _neighbours(h, coarse_h, FACTOR_H)
    w_low, w_high = _neighbours(w, coarse_w, FACTOR_W)
    d_low, d_high = _neighbours(d, coarse_d, FACTOR_D)
    low = x_ptr + _plane_address(n, d_low, x_stride, coarse_h, coarse_w, C)
    low = _fine_plane(low, h_low, h_high, w_low, w_high, channels, coarse_w, C, FACTOR_H, FACTOR_W)
    high = low
    if FACTOR_D == 2:
        high = x_ptr + _plane_address(n, d_high, x_stride, coarse_h, coarse_w, C)
        high = _fine_plane(high, h_low, h_high, w_low, w_high, channels, coarse_w, C, FACTOR_H, FACTOR_W)

    row = FACTOR_D * d - FACTOR_D + 1 - first_row
    for i in tl.static_range(FACTOR_H):
        for j in tl.static_range(FACTOR_W):
            fine_h = FACTOR_H * h - FACTOR_H + 1 + i
            fine_w = FACTOR_W * w - FACTOR_W + 1 + j
            first, second = low[2 * i + j], high[2 * i + j]
            if FACTOR_D == 2:
                first, second = _between(first, second)
                exists = row + 1 < rows
                _store(
                    second, out_ptr, addend_ptr, n, row + 1, exists, fine_h, fine_w, channels, height, width,
                    out_stride, addend_stride, C, BLOCK_C,
                )  # fmt: skip
            _store(
                first, out_ptr, addend_ptr, n, row, row >= 0, fine_h, fine_w, channels, height, width,
                out_stride, addend_stride, C, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _tap(coarse, i: tl.constexpr, size, FACTOR: tl.constexpr):
    """The fine index that is tap i of coarse ones; where upsampling makes none such, the nearest."""
    if FACTOR == 2:
        return tl.minimum(tl.maximum(2 * coarse - 1 + i, 0), 2 * size - 1)
    else:
        return tl.minimum(coarse, size - 1)


@triton.constexpr_function
def _weight(i: int, factor: int) -> float:
    """Of tap i along an axis."""
    return (0.25, 0.75, 0.75, 0.25)[i] if factor == 2 else 1.0


@triton.jit
def _coarse_plane(
    grad_ptr, n, d, first_row, rows, coarse_d, h, w, channels, coarse_h, coarse_w, height, width, grad_stride,
    FACTOR_D: tl.constexpr, FACTOR_H: tl.constexpr, FACTOR_W: tl.constexpr, CUT: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What fine row d gives to the coarse voxels (h, w) of a plane, [BLOCK_M, BLOCK_C] float32: a
    weighted sum of the fine row's taps, 0 for what was cut off. Taps exist in height and width unless CUT."""
    if FACTOR_D == 2:
        d = tl.minimum(tl.maximum(d, 0), 2 * coarse_d - 1)
    d -= first_row
    total = tl.zeros((h.shape[0], BLOCK_C), tl.float32)
    if (d >= 0) & (d < rows):
        plane = grad_ptr + _plane_address(n, d, grad_stride, height, width, C)
        for i in tl.static_range(3 * FACTOR_H - 2):
            fine_h = _tap(h, i, coarse_h, FACTOR_H)
            line = fine_h * (width * C) + channels
            for j in tl.static_range(3 * FACTOR_W - 2):
                fine_w = _tap(w, j, coarse_w, FACTOR_W)
                mask = channels < C
                if CUT:
                    mask = mask & (fine_h < height) & (fine_w < width)
                value = tl.load(plane + (line + fine_w * C), mask=mask, other=0.0)
                total += value.to(tl.float32) * (_weight(i, FACTOR_H) * _weight(j, FACTOR_W))
    return total


@kernel
def _upsample_transpose_kernel(
    grad_ptr,  # [N, rows, height, width, C]
    out_ptr,  # [N, coarse_d, coarse_h, coarse_w, C]
    coarse_d, coarse_h, coarse_w, first_row, rows, height, width, tiles_w,
    grad_stride, out_stride,
    FACTOR_D: tl.constexpr, FACTOR_H: tl.constexpr, FACTOR_W: tl.constexpr, CUT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = the transpose of upsampling, of grad, which holds the fine rows from first_row on.

    All of out is written; samples are *_stride voxels apart. A program has BLOCK_H x BLOCK_W coarse voxels
    and marches through the cells of BLOCK_D planes, so a fine plane is read once for both coarse ones that it
    belongs to (twice at the ends). Sums in float32.
    """
    # With fine_f = sum over H and W of the taps' weights times grad_f, for every cell i of the march:
    #   out_{i - 1} = carried + 3/4 fine_{2i - 1} + 1/4 fine_{2i}
    #   carried = 1/4 fine_{2i - 1} + 3/4 fine_{2i},  which is what the cell gives to coarse plane i
    h, w, channels = _position(tiles_w, C, BLOCK_H, BLOCK_W, BLOCK_C)
    n = tl.program_id(2)
    start = tl.program_id(1) * BLOCK_D
    end = tl.minimum(start + BLOCK_D, coarse_d)
    if FACTOR_D == 1:
        for d in range(start, end):
            total = _coarse_plane(
                grad_ptr, n, d, first_row, rows, coarse_d, h, w, channels, coarse_h, coarse_w, height, width,
                grad_stride, FACTOR_D, FACTOR_H, FACTOR_W, CUT, C, BLOCK_C,
            )  # fmt: skip
            _store(
                total, out_ptr, None, n, d, d >= start, h, w, channels, coarse_h, coarse_w, out_stride, 0,
                C, BLOCK_C,
            )  # fmt: skip
    else:
        carried = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
        for cell in range(start, end + 1):
            first = _coarse_plane(
                grad_ptr, n, 2 * cell - 1, first_row, rows, coarse_d, h, w, channels, coarse_h, coarse_w,
                height, width, grad_stride, FACTOR_D, FACTOR_H, FACTOR_W, CUT, C, BLOCK_C,
            )  # fmt: skip
            second = _coarse_plane(
                grad_ptr, n, 2 * cell, first_row, rows, coarse_d, h, w, channels, coarse_h, coarse_w,
                height, width, grad_stride, FACTOR_D, FACTOR_H, FACTOR_W, CUT, C, BLOCK_C,
            )  # fmt: skip
            _store(
                carried + 0.75 * first + 0.25 * second, out_ptr, None, n, cell - 1, cell > start, h, w,
                channels, coarse_h, coarse_w, out_stride, 0, C, BLOCK_C,
            )  # fmt: skip
            carried = 0.25 * first + 0.75 * second
