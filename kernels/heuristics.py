"""The configuration of a problem that was not measured: what ahead-of-time compiles recommend. What differs
from one architecture to the next is a table (`effseg.kernels.limits`). Pure Python."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from effseg.kernels.config import ARCHITECTURES, DTYPES, INTERPRETER, LOOPS, Config, Problem, power_of_two
from effseg.kernels.limits import LIMITS, Limits
from effseg.kernels.tuned import compilers

WIDEST_SLIDE = 64
"""Channels for which the registers hold `slide`'s three accumulators, without a prologue's operands."""
WIDE_TENSOR_MEMORY = (3, 9)
"""The Triton that keeps `slide`'s accumulators of 64 columns within tensor memory's 512; those before ask for
more, and compile that to a trap."""


def nearest_known(architecture: str) -> str:
    """The newest architecture with heuristics that is not newer; the oldest for still older ones."""
    number = int(architecture.removeprefix("sm_"))
    return max((a for a in ARCHITECTURES if int(a[3:]) <= number), key=lambda a: int(a[3:]), default="sm_80")


def heuristic(problem: Problem, loop: str = "") -> Config:
    """What ahead-of-time compiles recommend: the fewest issued instructions a voxel without spills.

    loop: of a convolution, in place of that which is recommended.
    """
    if problem.op not in LOOPS:
        raise ValueError(f"op: expected one of {', '.join(LOOPS)}, got {problem.op!r}")
    if problem.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {problem.dtype!r}")
    interpreted = problem.architecture == INTERPRETER
    if not interpreted:
        problem = replace(problem, architecture=nearest_known(problem.architecture))
    if problem.op.startswith("conv3d"):
        loop = loop or loop_of(problem)
    if interpreted:
        return _interpreted(problem, loop)
    if problem.op == "conv3d_wgrad":
        return _wgrad(problem, loop)
    if problem.op in ("conv3d_fwd", "conv3d_dgrad"):
        return _conv(problem, loop)
    if problem.op.startswith("head"):
        return _head(problem)
    return _elementwise(problem)


def by_heuristic(problem: Problem) -> Config:
    """`heuristic`, remembered."""
    return _by_heuristic(problem, _triton())


@lru_cache(maxsize=4096)
def _by_heuristic(problem: Problem, triton: tuple[int, int]) -> Config:
    """For what it depends on."""
    return heuristic(problem)


def processors(problem: Problem) -> int:
    """Multiprocessors to spread programs over."""
    return problem.multiprocessors or _limits(problem).multiprocessors


def _limits(problem: Problem) -> Limits:
    """Of the interpreter, which has none, those of the newest: it runs the loops that GPUs run."""
    return LIMITS[ARCHITECTURES[-1] if problem.architecture == INTERPRETER else problem.architecture]


def contraction(problem: Problem) -> tuple[int, int]:
    """(channels that are summed over, channels that come out) of forward and dgrad."""
    channels = problem.in_channels, problem.out_channels
    return channels if problem.op == "conv3d_fwd" else channels[::-1]


def loop_of(problem: Problem) -> str:
    """The main loop of a convolution.

    The marches reuse what they have read of a 3x3x3 convolution of stride 1: forward and dgrad along D with
    rotating accumulators; wgrad over pairs of w-neighbours, which fill the 64 rows of a tensor instruction,
    and over single voxels where channels fill them.
    """
    marches = problem.kernel == (3, 3, 3) and problem.stride == (1, 1, 1)
    if problem.op == "conv3d_wgrad":
        channels = (problem.in_channels, problem.out_channels)
        fitting = {
            "pair3": channels == (16, 16),
            "pair": all(c in (16, 32) for c in channels),
            "kw": 32 < max(channels) <= 64 and min(channels) >= 16,
        }
        possible = _limits(problem).wgrad_marches if marches else ()
        return next((loop for loop in possible if fitting[loop]), "tap")
    depth, _ = contraction(problem)
    if problem.op == "conv3d_fwd" and depth < 16:
        return "few"
    activated = problem.op == "conv3d_fwd" and problem.prologue
    widest = _limits(problem).slide_prologue.of(problem.dtype) if activated else WIDEST_SLIDE
    return "slide" if marches and depth <= widest else "tap"


def _padded(channels: int) -> int:
    return max(16, power_of_two(channels))


def _block_k(problem: Problem, most: int) -> int:
    """A block that divides the channels, so that none is masked, unless that takes very many turns."""
    channels, _ = contraction(problem)
    divides = channels & -channels
    spread = math.prod(problem.stride) if problem.op == "conv3d_dgrad" else 1
    many = math.prod(problem.kernel) // spread > 8
    return min(most, divides if divides >= (32 if many else 16) else _padded(channels))


def _interpreted(problem: Problem, loop: str) -> Config:
    """Time goes with programs times loop iterations, and wide tiles on tiny volumes are mostly masks."""
    padded = _padded(problem.in_channels), _padded(problem.out_channels)
    if problem.op == "conv3d_wgrad":
        block_k = min(64, 16 * power_of_two(math.prod(problem.kernel)))
        return Config(
            loop,
            block_d=3,
            block_h=4,
            block_w=8,
            block_n=min(32, padded[1]),
            block_k=block_k,
            splits=2,
        )
    if problem.op in ("conv3d_fwd", "conv3d_dgrad"):
        depth, columns = map(_padded, contraction(problem))
        block_k = 64 if loop == "few" else min(32, depth)
        return Config(loop, block_d=3, block_h=4, block_w=8, block_n=min(32, columns), block_k=block_k)
    if problem.op.startswith("upsample"):
        return Config("tile", block_d=2, block_h=8, block_w=8, block_n=min(32, padded[0]))
    return Config("tile", block_w=32, block_n=min(32, padded[0]), splits=4)


def _conv(problem: Problem, loop: str) -> Config:
    """Forward and dgrad: the largest tile whose accumulators, operands and epilogue the registers hold."""
    fp32 = problem.dtype == "fp32"
    channels, columns = map(_padded, contraction(problem))
    if loop == "slide":
        return _slide(problem, channels, columns)
    if loop == "few":
        block_k = min(64, _padded(math.prod(problem.kernel) * problem.in_channels))
        return Config(loop, block_d=8, block_h=8, block_w=16, block_n=min(64, columns), block_k=block_k)
    block_n = min(64 if fp32 else 128, columns)
    # dgrad's epilogue holds the forward pass's input beside the accumulators.
    crowded = problem.prologue and (problem.op == "conv3d_dgrad" or _limits(problem).tap_prologue_crowds)
    return Config(
        loop,
        block_d=4,
        block_h=4 if crowded and block_n > 64 else 8,
        block_w=16,
        block_n=block_n,
        block_k=_block_k(problem, 32 if fp32 else 64),
        num_warps=8 if block_n > 32 else 4,
        num_stages=1 if crowded and block_n <= 32 and problem.op == "conv3d_fwd" else 2,
    )


def _triton() -> tuple[int, int]:
    """Major and minor version of the installed one; of none, that of the newest heuristics."""
    major, minor = compilers().get("triton", "3.9").split(".")[:2]
    return int(major), int(minor)


def _slide(problem: Problem, channels: int, columns: int) -> Config:
    """The table's: three accumulators take the registers, so that a tile shrinks before it spills."""
    limits, dtype = _limits(problem), problem.dtype
    wide = channels <= limits.slide_wide.of(dtype)
    crowded = wide and _triton() < WIDE_TENSOR_MEMORY
    block_n = min((limits.slide_columns_before if crowded else limits.slide_columns).of(dtype), columns)
    four = limits.slide_four_warps if problem.op == "conv3d_fwd" else limits.dgrad_four_warps
    return Config(
        "slide",
        block_d=32,
        block_h=8,
        block_w=16 if wide else 8,
        block_n=block_n,
        num_warps=4 if max(channels, block_n) <= four.of(dtype) else 8,
    )


def _wgrad(problem: Problem, loop: str) -> Config:
    """Without a prologue loads are pipelined in shared memory; with one they pass through registers."""
    fp32, limits, programs = problem.dtype == "fp32", _limits(problem), processors(problem)
    if loop == "tap":
        return _wgrad_tap(problem, programs)
    channels = max(problem.in_channels, problem.out_channels)
    crowded = loop == "pair" and problem.in_channels > limits.pair_wide
    few_warps = loop == "pair" and channels == limits.pair_four_warps
    return Config(
        loop,
        block_d=32,
        block_h=2 if fp32 or crowded else 4,
        block_w=8 if crowded and problem.prologue and not fp32 else 16,
        splits=programs if loop == "pair3" else programs // 3,
        num_warps=4 if few_warps and problem.prologue else 8,
        num_stages=1 if fp32 or problem.prologue else 2,
    )


def _wgrad_tap(problem: Problem, processors: int) -> Config:
    """rows, the product's first axis, are taps times input channels."""
    fp32 = problem.dtype == "fp32"
    rows = problem.in_channels * math.prod(problem.kernel)
    columns = _padded(problem.out_channels)
    if rows <= 32:  # a network's first layer
        return Config(
            "tap", block_h=8, block_w=16, block_n=min(32, columns), block_k=32, splits=8 * processors
        )
    block_n = min(64 if fp32 or problem.prologue else 128, columns)
    block_k = min(64 if fp32 else 128, power_of_two(rows))
    blocks = math.ceil(rows / block_k) * math.ceil(problem.out_channels / block_n)
    return Config(
        "tap",
        block_h=4,
        block_w=16,
        block_n=block_n,
        block_k=block_k,
        splits=max(1, round(2 * processors / blocks)),
        num_warps=8 if block_n > 64 else 4,
        num_stages=1 if problem.prologue else _limits(problem).tap_stages.of(problem.dtype),
    )


def _head(problem: Problem) -> Config:
    """Sums are kept for every logit of a tile."""
    channels, classes = _padded(problem.in_channels), _padded(problem.out_channels)
    limits, backward = _limits(problem), problem.op == "head_backward"
    if problem.op == "head_argmax":
        return Config("tile", block_w=max(16, min(64, 8192 // classes)), splits=512)
    logits = limits.logits.of(problem.dtype) if channels <= 64 else 1024
    if backward and (classes > 16 or channels > 32):
        logits = 1024 if channels <= 64 else 512
    wide = classes > 128 or (backward and classes >= 128 and channels >= 128)
    return Config(
        "classes" if backward and classes >= 64 and channels not in limits.tile_backward else "tile",
        block_w=max(16, logits // classes),
        splits=512,
        num_warps=8 if wide else 4,
    )


def _elementwise(problem: Problem) -> Config:
    """Tiles of whole 16-byte loads, as many as leave registers for several programs a multiprocessor."""
    block_n = min(64, power_of_two(problem.in_channels))
    # Values that four warps read with one instruction.
    one_load = 4 * 32 * (4 if problem.dtype == "fp32" else 8)
    if problem.op.startswith("upsample"):
        return Config(
            "tile", block_d=8, block_h=4, block_w=max(1, one_load // (4 * block_n)), block_n=block_n
        )
    resident = 4 if problem.op == "norm_act_backward" else 8
    loads = 2 if problem.op in ("norm_act_backward", "moments") else 4
    splits = resident * processors(problem)
    return Config("tile", block_w=loads * one_load // block_n, block_n=block_n, splits=splits)
