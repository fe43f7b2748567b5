"""Tile configurations: what is chosen for a kernel before it is launched. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

INTERPRETER = "interpreter"
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Config:
    """loop: which main loop, of those that the operator has; block_*: voxels of a tile along D, H, W, output channels and
    depth of the contraction; splits: programs that share a reduction. 0 where the loop does not have it."""

    loop: str
    block_d: int = 0
    block_h: int = 0
    block_w: int = 0
    block_n: int = 0
    block_k: int = 0
    splits: int = 0
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class Problem:
    """op: conv3d_fwd, conv3d_dgrad, conv3d_wgrad, norm_act, upsample, head ...; dtype: fp32, bf16 or fp16; prologue: whether
    the input is normalised and activated as it is read; size: (D, H, W) of what the programs tile; architecture: sm_90
    and the like, or INTERPRETER."""

    op: str
    architecture: str
    dtype: str
    in_channels: int
    out_channels: int
    size: Triple
    kernel: Triple = (1, 1, 1)
    stride: Triple = (1, 1, 1)
    prologue: bool = False


def choose(problem: Problem) -> Config:
    """The configuration for a problem."""
    raise NotImplementedError(problem)
