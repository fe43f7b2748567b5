"""A table an architecture: the sizes up to which its kernels, as compiled, keep all they need in registers.

Found with `python -m effseg.inspection`, not on a GPU: the largest tiles without spills, and of those the one
of the fewest issued instructions a voxel. `effseg.kernels.heuristics` reads it. Pure Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ByType(NamedTuple):
    """One value for operands of 16 bits, one for float32, which take twice the registers."""

    half: int
    single: int

    def of(self, dtype: str) -> int:
        return self.single if dtype == "fp32" else self.half


@dataclass(frozen=True)
class Limits:
    """multiprocessors: of the architecture's largest GPU.

    Of forward and dgrad:
    slide_prologue: most input channels with which forward's `slide` has a prologue;
    slide_wide: most channels with which a tile of `slide` is 8 x 16 voxels, and not 8 x 8;
    slide_columns: most output channels of a program of `slide`;
    slide_columns_before: the same for wide tiles before `heuristics.WIDE_TENSOR_MEMORY`;
    slide_four_warps, dgrad_four_warps: most channels, in or out, for which four warps do and not eight;
    tap_prologue_crowds: whether a prologue takes registers that forward's `tap` lacks.

    Of wgrad:
    wgrad_marches: its marches;
    pair_wide: most input channels with which a tile of `pair` has its full size;
    pair_four_warps: channels, the more of in and out, of which four warps do with a prologue; 0: of none;
    tap_stages: of loads under way in `tap`, without a prologue.

    Of the head:
    logits: of a tile; a thread has registers for 16 of them at most;
    tile_backward: padded input channels with which backward of many classes has logits by voxel.
    """

    multiprocessors: int
    slide_prologue: ByType
    slide_wide: ByType
    slide_columns: ByType
    slide_columns_before: ByType
    slide_four_warps: ByType
    dgrad_four_warps: ByType
    tap_prologue_crowds: bool
    wgrad_marches: tuple[str, ...]
    pair_wide: int
    pair_four_warps: int
    tap_stages: ByType
    logits: ByType
    tile_backward: tuple[int, ...]


# mma reads both operands from registers, beside the accumulators: tiles are smaller than with wgmma, and the
# marches of wgrad with three and nine accumulators spill.
SM_80 = Limits(
    multiprocessors=108,
    slide_prologue=ByType(32, 32),
    slide_wide=ByType(16, 0),
    slide_columns=ByType(32, 32),
    slide_columns_before=ByType(32, 32),
    slide_four_warps=ByType(32, 16),
    dgrad_four_warps=ByType(32, 32),
    tap_prologue_crowds=False,
    wgrad_marches=("pair",),
    pair_wide=16,
    pair_four_warps=16,
    tap_stages=ByType(2, 2),
    logits=ByType(1024, 1024),
    tile_backward=(),
)

# wgmma reads operands from shared memory: registers hold accumulators, and what a prologue activates.
SM_90 = Limits(
    multiprocessors=132,
    slide_prologue=ByType(64, 32),
    slide_wide=ByType(64, 0),
    slide_columns=ByType(64, 32),
    slide_columns_before=ByType(64, 32),
    slide_four_warps=ByType(16, 16),
    dgrad_four_warps=ByType(16, 16),
    tap_prologue_crowds=False,
    wgrad_marches=("pair3", "pair", "kw"),
    pair_wide=32,
    pair_four_warps=0,
    tap_stages=ByType(3, 2),
    logits=ByType(2048, 1024),
    tile_backward=(32, 64),
)

# tcgen05 accumulates in tensor memory, whose 512 columns bound `slide`; accumulators pass through registers
# for what follows, where a prologue's operands meet them.
SM_100 = Limits(
    multiprocessors=148,
    slide_prologue=ByType(64, 32),
    slide_wide=ByType(32, 0),
    slide_columns=ByType(64, 32),
    slide_columns_before=ByType(32, 32),
    slide_four_warps=ByType(16, 16),
    dgrad_four_warps=ByType(16, 16),
    tap_prologue_crowds=True,
    wgrad_marches=("pair3", "pair", "kw"),
    pair_wide=32,
    pair_four_warps=0,
    tap_stages=ByType(3, 2),
    logits=ByType(2048, 1024),
    tile_backward=(32, 64),
)

LIMITS = {"sm_80": SM_80, "sm_90": SM_90, "sm_100": SM_100}
