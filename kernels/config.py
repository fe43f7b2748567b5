"""What a configuration of a kernel is, and the problem that it is for. Pure Python.

`effseg.kernels.choose` finds one for the other: in tuned files (`tuned`), else by `heuristics`.
"""

from __future__ import annotations

from dataclasses import dataclass

INTERPRETER = "interpreter"
ATEN = "aten"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""Those with heuristics of their own, and for which kernels are inspected."""
Triple = tuple[int, int, int]

LOOPS = {
    "conv3d_fwd": ("slide", "tap", "few"),
    "conv3d_dgrad": ("slide", "tap"),
    "conv3d_wgrad": ("pair3", "pair", "kw", "tap"),
    "norm_act": ("tile",),
    "norm_act_backward": ("tile",),
    "fold": ("tile",),
    "moments": ("tile",),
    "upsample": ("tile",),
    "upsample_transpose": ("tile",),
    "head_sums": ("tile",),
    "head_backward": ("tile", "classes"),
    "head_argmax": ("tile",),
}
"""The main loops of each operator; every operator may also be left to ATEN."""

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Config:
    """loop: which main loop, of those that the operator has; block_*: voxels of a tile along D, H, W, output
    channels and depth of the contraction; splits: programs that share a reduction. 0 where a loop does not
    have it."""

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
    """op: one of LOOPS; architecture: sm_90 and the like, or INTERPRETER; dtype: one of DTYPES; in_channels,
    out_channels: of the forward operator, for its gradients too; size: (D, H, W) of what the programs tile;
    prologue: whether the input is normalised and activated as it is read; gpu: the name of its tuned files,
    empty for heuristics only; multiprocessors: that it has, 0 for as many as the architecture's largest."""

    op: str
    architecture: str
    dtype: str
    in_channels: int
    out_channels: int
    size: Triple
    kernel: Triple = (1, 1, 1)
    stride: Triple = (1, 1, 1)
    prologue: bool = False
    gpu: str = ""
    multiprocessors: int = 0


def power_of_two(n: int) -> int:
    """The least power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def blocks(size: int, block: int) -> int:
    """How many of `block` cover a size; `triton.cdiv` is for kernels, and slow on the host."""
    return -(-size // block)
