"""What the host does for every pass of a convolution over its main loops: weights and terms as kernels read
them, grids, and the second level of the reductions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effseg.common.once import made_once
from effseg.kernels.config import INTERPRETER, Config, Triple, blocks, power_of_two
from effseg.kernels.conv3d_epilogue import BACKWARD, PLAIN, STATISTICS
from effseg.kernels.conv3d_few import conv3d_few_kernel
from effseg.kernels.conv3d_slide import conv3d_slide_kernel
from effseg.kernels.conv3d_tap import conv3d_tap_kernel
from effseg.kernels.launch import DTYPES, NormAct, architecture, input_precision, launch, sample_stride

SLIDE_CHANNELS = 64
Backward = tuple[Tensor, NormAct]


@dataclass(frozen=True)
class Positions:
    """out[spread q + parity] reads x[step q + offset + t] for t < taps and q < size, per axis (D, H, W)."""

    size: Triple
    taps: Triple
    offset: Triple
    step: Triple = (1, 1, 1)
    spread: Triple = (1, 1, 1)
    parity: Triple = (0, 0, 0)

    def tiles(self, config: Config) -> int:
        d, h, w = self.size
        return blocks(d, config.block_d) * blocks(h, config.block_h) * blocks(w, config.block_w)


def check_dtypes(**tensors: Tensor) -> None:
    """A TypeError for a tensor that no kernel reads."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")


def check_loop(config: Config, positions: Positions, channels: int, backward: bool) -> None:
    """A ValueError for a configuration that does not fit the problem."""
    if config.loop == "slide":
        units = (positions.step, positions.spread)
        if positions.taps != (3, 3, 3) or units != ((1, 1, 1),) * 2 or channels > SLIDE_CHANNELS:
            raise ValueError(
                f"loop 'slide' is for 3x3x3 convolutions of stride 1 over at most {SLIDE_CHANNELS} channels, "
                f"got {positions} over {channels}"
            )
    elif config.loop == "few":
        if backward or positions.spread != (1, 1, 1):
            raise ValueError("loop 'few' has neither a stride in its output nor dgrad's epilogue")
    elif config.loop != "tap":
        raise ValueError(f"loop: expected 'slide', 'tap' or 'few', got {config.loop!r}")


def operands_in_registers(arch: str) -> bool:
    """Whether the tensor core reads its operands from registers (mma, and not wgmma or tcgen05)."""
    return not arch.startswith((INTERPRETER, "sm_9", "sm_10"))


def unrolled(slide: bool, block_k: int, arch: str) -> bool:
    """Whether the compiler may unroll the inner loop: where, as compiled, that spills no registers."""
    return not operands_in_registers(arch) or (slide and block_k > 16)


def sums_per_place(config: Config, block_k: int, arch: str) -> bool:
    """Whether registers hold two sums a place beside the accumulators, of which `slide` has three."""
    room = 32
    if config.loop == "slide":
        room = 256 // block_k if operands_in_registers(arch) else 16
    return config.block_h * config.block_w * config.block_n <= 32 * config.num_warps * room


def padded_terms(terms: Tensor, columns: int) -> Tensor:
    """(N, C) as (N, columns) float32, zeros after C."""
    missing = columns - terms.shape[1]
    return (F.pad(terms.float(), (0, missing)) if missing else terms.float()).contiguous()


def packed_weight(weight: Tensor, dtype: torch.dtype, flat: bool, block_k: int, columns: int) -> Tensor:
    """(out, in, *taps) as (*taps, in, columns), zeros up to `columns` and, in what is contracted (`in` or,
    flat, all but the last), up to whole blocks."""
    found = weight.permute(2, 3, 4, 1, 0)
    if flat:
        found = found.reshape(-1, found.shape[-1])
    *taps, depth, width = found.shape
    shape = (*taps, blocks(depth, block_k) * block_k, columns)
    if shape == found.shape:
        return found.to(dtype, memory_format=torch.contiguous_format).contiguous()
    packed = torch.zeros(shape, dtype=dtype, device=weight.device)
    packed[..., :depth, :width] = found
    return packed


def contract(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    positions: Positions,
    config: Config,
    *,
    prologue: NormAct | None = None,
    bias: Tensor | None = None,
    statistics: bool = False,
    backward: Backward | None = None,
) -> Tensor | None:
    """One launch of a main loop: out = epilogue(sum over taps t of a(x[...]) weight[..., t]).

    x and out are channels last; weight (out channels, channels of x, *taps). Gives the partial rows
    (N, tiles, vectors, out channels) of an epilogue that reduces.
    """
    samples, channels, depth, height, width = x.shape
    out_channels = out.shape[1]
    check_loop(config, positions, channels, backward is not None)
    flat, slide = config.loop == "few", config.loop == "slide"
    block_k = max(16, power_of_two(channels)) if slide else config.block_k
    channel_blocks = blocks(out_channels, config.block_n)
    columns = channel_blocks * config.block_n
    tiles = positions.tiles(config)
    epilogue = BACKWARD if backward else STATISTICS if statistics else PLAIN
    rows = (1,) if epilogue is PLAIN else (samples, tiles, 3 if statistics else 2, columns)
    partial = torch.empty(rows, dtype=torch.float32, device=x.device)
    # What an option leaves unused is not read; any pointer will do.
    y, after_slope = out, 1.0
    after: tuple[Tensor, ...] = (partial,) * 3
    if backward is not None:
        y, terms = backward
        after = tuple(padded_terms(t, columns) for t in (terms.mean, terms.scale, terms.beta))
        after_slope = terms.slope
    before: tuple[Tensor, ...] = (partial,) * 2
    if prologue is not None:
        mean, scale, beta = (t.float() for t in prologue[:3])
        shift = torch.addcmul(beta, mean, scale, value=-1)
        depth_of_terms = channels if flat else blocks(channels, block_k) * block_k
        before = tuple(padded_terms(t, depth_of_terms) for t in (scale, shift))
    bias_row = partial if bias is None else padded_terms(bias[None], columns)
    packed = made_once(packed_weight, weight, out.dtype, flat, block_k, columns)
    pointers = x, packed, out, partial, *before, bias_row
    strides = tuple(map(sample_stride, (x, out, y)))
    arch = architecture(x.device)
    options: dict[str, Any] = dict(
        C=channels,
        CHANNELS=out_channels,
        CHANNEL_BLOCKS=channel_blocks,
        PROLOGUE=prologue is not None,
        SLOPE=1.0 if prologue is None else float(prologue.slope),
        EPILOGUE=epilogue,
        HAS_BIAS=bias is not None,
        BLOCK_D=config.block_d,
        BLOCK_H=config.block_h,
        BLOCK_W=config.block_w,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        PER_PLACE=sums_per_place(config, block_k, arch),
        PRECISION=input_precision(out.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if not slide:
        options |= dict(TAPS=positions.taps, STEP=positions.step, OFFSETS=positions.offset[1:])
    if not flat:
        options["EPILOGUE_SLOPE"] = float(after_slope)
        options["UNROLLED"] = unrolled(slide, block_k, arch)
    grid = (tiles * channel_blocks, samples)
    sizes: tuple[int, ...]
    offset = positions.offset[0]
    if slide:
        sizes = (depth, height, width, positions.size[0], offset, positions.taps[1], tiles)
        launch(conv3d_slide_kernel, grid, *pointers, y, *after, *strides, *sizes, **options)
    elif flat:
        sizes = (depth, height, width, *positions.size, offset, tiles)
        launch(conv3d_few_kernel, grid, *pointers, *strides[:2], *sizes, **options)
    else:
        turns = math.prod(positions.taps) * blocks(channels, block_k)
        parity, *plane_class = positions.parity
        sizes = (depth, height, width, *positions.size, *out.shape[3:], offset, parity, turns, tiles)
        options |= dict(SPREAD=positions.spread, CLASS=tuple(plane_class))
        launch(conv3d_tap_kernel, grid, *pointers, y, *after, *strides, *sizes, **options)
    return None if epilogue is PLAIN else partial[..., :out_channels]
