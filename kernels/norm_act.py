"""Normalisation and activation of stored features, their gradient, and the gradient through statistics.

One read and one write of every tensor; arithmetic in float32, rounded once where it is stored.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from effseg.kernels.common import kernel, leaky_relu, leaky_relu_backward
from effseg.kernels.config import Config
from effseg.kernels.flat import (
    feature,
    load_term,
    output,
    term,
    tile_address,
    tile_mask,
    tile_offsets,
    tiling,
)
from effseg.kernels.launch import NormAct, launch, sample_stride


@kernel
def _norm_act_kernel(
    y_ptr,  # [N, voxels, C]
    mean_ptr, scale_ptr, beta_ptr,  # [N, C] float32
    addend_ptr, out_ptr,  # [N, voxels, C]; addend may be None
    voxels, y_stride, addend_stride, out_stride,
    SLOPE: tl.constexpr, C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = leaky_relu((y - mean) * scale + beta + addend), one tile [BLOCK_V, BLOCK_C].

    Samples are *_stride voxels apart. Masked: voxels after the last, channels from C on.
    """
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile, n = tl.program_id(0) // CHANNEL_BLOCKS, tl.program_id(1)
    channels = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = tile_offsets(channels, C, BLOCK_V)
    mask = tile_mask(tile, voxels, channels, C, BLOCK_V, BLOCK_C)

    y = tl.load(y_ptr + tile_address(n, tile, y_stride, C, BLOCK_V) + offsets, mask=mask).to(tl.float32)
    mean = load_term(mean_ptr, n, channels, C)
    z = (y - mean) * load_term(scale_ptr, n, channels, C) + load_term(beta_ptr, n, channels, C)
    if addend_ptr is not None:
        z += tl.load(addend_ptr + tile_address(n, tile, addend_stride, C, BLOCK_V) + offsets, mask=mask)
    a = leaky_relu(z, SLOPE)
    out = out_ptr + tile_address(n, tile, out_stride, C, BLOCK_V) + offsets
    tl.store(out, a.to(out_ptr.dtype.element_ty), mask=mask)


@kernel
def _norm_act_backward_kernel(
    grad_ptr, y_ptr, activated_ptr,  # [N, voxels, C]; activated may be None
    mean_ptr, scale_ptr, beta_ptr,  # [N, C] float32
    dy_ptr, dz_ptr,  # [N, voxels, C]; may be None
    partial_ptr,  # [N, programs, 2, C] float32; may be None
    voxels,
    grad_stride, y_stride, activated_stride, dy_stride, dz_stride,
    SLOPE: tl.constexpr, C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz = grad * act'(z), dy = dz * scale, partial = (sum dz (y - mean), sum dz).

    Samples are *_stride voxels apart. Sums are of unrounded values, added in float32 for each place in the
    tile. A tile is read before it is written, so dz may be grad. Masked: voxels after the last, channels from
    C on.
    """
    # For every `programs`-th tile [BLOCK_V, BLOCK_C]:
    #   dz = grad * act'((y - mean) * scale + beta), or act'(activated);   dy = dz * scale
    #   dscale += dz * (y - mean);   dbeta += dz
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, n = tl.program_id(0) // CHANNEL_BLOCKS, tl.program_id(1)
    programs = tl.num_programs(0) // CHANNEL_BLOCKS
    channels = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = tile_offsets(channels, C, BLOCK_V)
    mean = load_term(mean_ptr, n, channels, C)
    scale = load_term(scale_ptr, n, channels, C)
    beta = load_term(beta_ptr, n, channels, C)

    dscale = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    dbeta = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(voxels, BLOCK_V), programs):
        mask = tile_mask(tile, voxels, channels, C, BLOCK_V, BLOCK_C)
        grad = grad_ptr + tile_address(n, tile, grad_stride, C, BLOCK_V) + offsets
        dz = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
        # Loads of y that nothing uses are removed by the compiler.
        y = y_ptr + tile_address(n, tile, y_stride, C, BLOCK_V) + offsets
        centred = tl.load(y, mask=mask, other=0.0).to(tl.float32) - mean
        if activated_ptr is None:
            dz = leaky_relu_backward(dz, centred * scale + beta, SLOPE)
        else:
            activated = activated_ptr + tile_address(n, tile, activated_stride, C, BLOCK_V) + offsets
            activated = tl.load(activated, mask=mask, other=0.0).to(tl.float32)
            dz = leaky_relu_backward(dz, activated, SLOPE)
        if partial_ptr is not None:
            dscale += dz * centred
            dbeta += dz
        if dz_ptr is not None:
            out = dz_ptr + tile_address(n, tile, dz_stride, C, BLOCK_V) + offsets
            tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if dy_ptr is not None:
            out = dy_ptr + tile_address(n, tile, dy_stride, C, BLOCK_V) + offsets
            tl.store(out, (dz * scale).to(dy_ptr.dtype.element_ty), mask=mask)

    if partial_ptr is not None:
        partial = partial_ptr + (n * programs + program) * 2 * C + channels
        tl.store(partial, tl.sum(dscale, 0), mask=channels < C)
        tl.store(partial + C, tl.sum(dbeta, 0), mask=channels < C)


@kernel
def _fold_kernel(
    grad_ptr, y_ptr,  # [N, voxels, C]; grad may be None
    mean_ptr, scale_ptr, shift_ptr,  # [N, C] float32
    out_ptr,  # [N, voxels, C]
    voxels, grad_stride, y_stride, out_stride,
    C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = grad + (y - mean) * scale + shift, one tile [BLOCK_V, BLOCK_C].

    Samples are *_stride voxels apart. Masked: voxels after the last, channels from C on.
    """
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile, n = tl.program_id(0) // CHANNEL_BLOCKS, tl.program_id(1)
    channels = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = tile_offsets(channels, C, BLOCK_V)
    mask = tile_mask(tile, voxels, channels, C, BLOCK_V, BLOCK_C)

    y = tl.load(y_ptr + tile_address(n, tile, y_stride, C, BLOCK_V) + offsets, mask=mask).to(tl.float32)
    mean = load_term(mean_ptr, n, channels, C)
    g = (y - mean) * load_term(scale_ptr, n, channels, C) + load_term(shift_ptr, n, channels, C)
    if grad_ptr is not None:
        g += tl.load(grad_ptr + tile_address(n, tile, grad_stride, C, BLOCK_V) + offsets, mask=mask)
    out = out_ptr + tile_address(n, tile, out_stride, C, BLOCK_V) + offsets
    tl.store(out, g.to(out_ptr.dtype.element_ty), mask=mask)


def norm_act(
    y: Tensor, terms: NormAct, out: Tensor, addend: Tensor | None = None, config: Config | None = None
) -> None:
    """out = leaky_relu((y - mean) * scale + beta + addend, slope); y, addend, out (N, C, d, h, w)."""
    y, out = feature("y", y), output("out", out, y.shape)
    if addend is not None:
        addend = feature("addend", addend)
        assert addend.shape == y.shape
    mean, scale, beta = (term(name, getattr(terms, name), y) for name in ("mean", "scale", "beta"))
    tiles = tiling("norm_act", y, config)
    launch(
        _norm_act_kernel, tiles.grid,
        y, mean, scale, beta, addend, out, tiles.voxels, *map(sample_stride, (y, addend, out)),
        SLOPE=float(terms.slope), **tiles.constants,
    )  # fmt: skip


def norm_act_backward(
    grad: Tensor,
    y: Tensor,
    terms: NormAct,
    *,
    activated: Tensor | None = None,
    dy: Tensor | None = None,
    dz: Tensor | None = None,
    sums: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor] | None:
    """dz = grad * act'(z) and dy = dz * scale, where given; with `sums` gives (sum dz (y - mean), sum dz).

    grad, y, activated, dy, dz: (N, C, d, h, w); sums: (N, C) float32. The sign of z is that of
    `activated`, needed where the forward had an addend, else recomputed from y. dz may be grad, which is then
    overwritten.
    """
    grad, y = feature("grad", grad), feature("y", y)
    assert grad.shape == y.shape
    if activated is not None:
        activated = feature("activated", activated)
        assert activated.shape == y.shape
    dy = None if dy is None else output("dy", dy, y.shape)
    dz = None if dz is None else output("dz", dz, y.shape)
    mean, scale, beta = (term(name, getattr(terms, name), y) for name in ("mean", "scale", "beta"))
    tiles = tiling("norm_act_backward", y, config)
    partial = None
    if sums:
        partial = torch.empty(tiles.samples, tiles.programs, 2, tiles.channels, device=y.device)
    launch(
        _norm_act_backward_kernel, tiles.reduction_grid if sums else tiles.grid,
        grad, y, activated, mean, scale, beta, dy, dz, partial, tiles.voxels,
        *map(sample_stride, (grad, y, activated, dy, dz)),
        SLOPE=float(terms.slope), **tiles.constants,
    )  # fmt: skip
    if partial is None:
        return None
    dscale, dbeta = partial.sum(1, dtype=torch.float64).float().unbind(1)
    return dscale, dbeta


def fold(
    grad: Tensor | None,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """out = grad (or 0) + (y - mean) * scale + shift; grad, y, out (N, C, d, h, w), terms (N, C) float32."""
    y, out = feature("y", y), output("out", out, y.shape)
    if grad is not None:
        grad = feature("grad", grad)
        assert grad.shape == y.shape
    mean, scale, shift = term("mean", mean, y), term("scale", scale, y), term("shift", shift, y)
    tiles = tiling("fold", y, config)
    launch(
        _fold_kernel, tiles.grid,
        grad, y, mean, scale, shift, out, tiles.voxels, *map(sample_stride, (grad, y, out)),
        **tiles.constants,
    )  # fmt: skip
