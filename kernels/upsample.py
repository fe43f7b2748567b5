"""Trilinear upsampling x2 (align_corners=False) and its transpose, over `upsample_loops`."""

from __future__ import annotations

from torch import Tensor

from effseg.kernels.choose import choose
from effseg.kernels.config import Config, blocks
from effseg.kernels.flat import feature, output
from effseg.kernels.launch import launch, problem, sample_stride
from effseg.kernels.upsample_loops import _upsample_kernel, _upsample_transpose_kernel

Factors = tuple[int, int, int]


def upsample_x2(
    x: Tensor,
    out: Tensor,
    *,
    rows: tuple[int, int],
    factors: Factors = (2, 2, 2),
    addend: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """out = fine rows [rows[0], rows[1]) of x upsampled, cut to out's height and width, + addend.

    x (N, C, n, hc, wc); out and addend (N, C, rows, h, w), h and w 2n or 2n - 1 along axes of factor 2. Rows
    are counted from x's first one, and x is taken to have no neighbours: its border rows are clamped. With
    factor 1 along D `rows` is not looked at: out has x's rows.
    """
    x, fine = feature("x", x), output("out", out, out.shape)
    first, size = _first_row(x, fine, rows, factors)
    if addend is not None:
        addend = feature("addend", addend)
        assert addend.shape == fine.shape
    config = config or choose(problem("upsample", fine))
    cells_d = (first + size[0]) // 2 - (first + 1) // 2 + 1 if factors[0] == 2 else size[0]
    cells_h, cells_w = (s // f + f - 1 for s, f in zip(size[1:], factors[1:], strict=True))
    tiles_w = blocks(cells_w, config.block_w)
    tiles = blocks(cells_h, config.block_h) * tiles_w * blocks(x.shape[1], config.block_n)
    launch(
        _upsample_kernel, (tiles, cells_d if size[0] else 0, x.shape[0]),
        x, addend, fine, *x.shape[2:], first, *size, tiles_w, *map(sample_stride, (x, addend, fine)),
        FACTOR_D=factors[0], FACTOR_H=factors[1], FACTOR_W=factors[2], C=x.shape[1],
        BLOCK_H=config.block_h, BLOCK_W=config.block_w, BLOCK_C=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def upsample_x2_transpose(
    grad: Tensor,
    out: Tensor,
    *,
    rows: tuple[int, int],
    factors: Factors = (2, 2, 2),
    config: Config | None = None,
) -> None:
    """out = the transpose of `upsample_x2` (without addend), of grad; grad is fine, out coarse."""
    grad, coarse = feature("grad", grad), output("out", out, out.shape)
    first, size = _first_row(coarse, grad, rows, factors)
    config = config or choose(problem("upsample_transpose", coarse))
    n, c, coarse_d, coarse_h, coarse_w = coarse.shape
    cut = size[1:] != [coarse_h * factors[1], coarse_w * factors[2]]
    tiles_w = blocks(coarse_w, config.block_w)
    tiles = blocks(coarse_h, config.block_h) * tiles_w * blocks(c, config.block_n)
    launch(
        _upsample_transpose_kernel, (tiles, blocks(coarse_d, config.block_d), n),
        grad, coarse, coarse_d, coarse_h, coarse_w, first, *size, tiles_w,
        sample_stride(grad), sample_stride(coarse),
        FACTOR_D=factors[0], FACTOR_H=factors[1], FACTOR_W=factors[2], CUT=cut, C=c,
        BLOCK_D=config.block_d, BLOCK_H=config.block_h, BLOCK_W=config.block_w, BLOCK_C=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _first_row(
    coarse: Tensor, fine: Tensor, rows: tuple[int, int], factors: Factors
) -> tuple[int, list[int]]:
    """The fine row that `fine` begins with, and its (rows, height, width); raises `ValueError` for
    shapes that do not belong together."""
    size = list(fine.shape[2:])
    first = rows[0] if factors[0] == 2 else 0
    lengths = [f * s for f, s in zip(factors, coarse.shape[2:], strict=True)]
    fits = set(factors) <= {1, 2} and fine.shape[:2] == coarse.shape[:2]
    fits &= all(
        f * s - f < got <= f * s for f, s, got in zip(factors[1:], coarse.shape[3:], size[1:], strict=True)
    )
    if factors[0] == 2:
        fits &= 0 <= rows[0] <= rows[1] <= lengths[0] and size[0] == rows[1] - rows[0]
    else:
        fits &= size[0] == lengths[0]
    if not fits:
        raise ValueError(
            f"expected coarse and fine of one upsampling by {factors}, rows {rows}, "
            f"got {tuple(coarse.shape)} and {tuple(fine.shape)}"
        )
    return first, size
