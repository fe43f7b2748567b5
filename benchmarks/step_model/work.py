"""What a launch of one of the package's kernels moves and computes, from its arguments, grid and constants.

Loops are counted as turns times body: `effseg.inspection.figures.work` says how many turns of the main loop
128 voxels take, `computed` for how many voxels a launch computes, those included that only fill tiles or are
a march's halo.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from benchmarks.step_model.compiled import Code
from benchmarks.step_model.devices import Device
from benchmarks.step_model.recording import distinct, nbytes
from effseg.inspection.figures import Work, work
from effseg.kernels.config import blocks
from effseg.kernels.launch import Launch

WRITTEN = frozenset(
    f"{name}_ptr"
    for name in ("out", "partial", "dy", "dz", "sums", "counts", "grad_weight", "grad_bias", "var")
)
BACKWARD = 2
"""`conv3d_epilogue.BACKWARD`."""


def arguments(launch: Launch) -> dict[str, Any]:
    return {**dict(zip(launch.kernel.arg_names, launch.args, strict=False)), **launch.options}


def epilogue_of(given: dict[str, Any]) -> int:
    """A constant, as the host gives it or as Triton wraps it."""
    return int(getattr(given["EPILOGUE"], "value", given["EPILOGUE"]))


def unused(given: dict[str, Any]) -> set[str]:
    """Pointers that a launch must give and its constants say that it does not follow."""
    names: set[str] = set()
    if "EPILOGUE" in given:
        epilogue = epilogue_of(given)
        names |= set() if epilogue == BACKWARD else {"y_ptr", "mean_ptr", "scale_ptr", "beta_ptr"}
        names |= {"partial_ptr"} if epilogue == 0 else set()
        names |= set() if given["HAS_BIAS"] else {"bias_ptr"}
        names |= set() if given["PROLOGUE"] else {"pre_scale_ptr", "pre_shift_ptr"}
    elif "FOLD" in given:
        names |= set() if given["FOLD"] else {"y_ptr", "out_ptr", "fold_scale_ptr", "fold_shift_ptr"}
        names |= set() if given["PROLOGUE"] else {"scale_ptr", "shift_ptr"}
    return names


def moved(launch: Launch) -> int:
    """Bytes: every tensor that is read counts once, every one that is written once; of an output with a
    stride, as a parity class of dgrad has, what is touched."""
    given = arguments(launch)
    tensors = {k: v for k, v in given.items() if isinstance(v, Tensor) and k not in unused(given)}
    share = 1 / math.prod(given.get("SPREAD", (1,)))
    apart = WRITTEN | {"y_ptr"}
    found = float(sum(map(nbytes, distinct([v for k, v in tensors.items() if k not in apart]))))
    for name in tensors.keys() & apart:
        found += nbytes(tensors[name]) * (share if name in ("out_ptr", "y_ptr") else 1)
    return round(found)


def computed(launch: Launch) -> int:
    """Voxels, of an upsampling fine ones, of a gradient of weights those of its contraction."""
    given = arguments(launch)
    samples = launch.grid[1] if len(launch.grid) > 1 else 1
    if "BLOCK_V" in given:
        return blocks(given["voxels"], given["BLOCK_V"]) * given["BLOCK_V"] * samples
    tile = given["BLOCK_H"], given["BLOCK_W"]
    if "FACTOR_D" in given:
        fine = math.prod(given[f"FACTOR_{axis}"] for axis in "DHW")
        tiles = launch.grid[0] // blocks(given["C"], given["BLOCK_C"])
        planes = given["coarse_d"] if "BLOCK_D" in given else launch.grid[1]
        return tiles * math.prod(tile) * planes * fine * launch.grid[2]
    if "CHANNEL_BLOCKS" in given:
        slide = "TAPS" not in given
        plane = (given["H"], given["W"]) if slide else (given["height"], given["width"])
        planes = marched(given) if slide else given["rows"]
        return planes * tiled(plane, tile) * samples
    if "LOOP" in given:
        pairs = 1 if given["LOOP"] == "kw" else 2
        return (
            given["samples"]
            * (given["out_rows"] + 2)
            * tiled((given["H"], given["W"]), (tile[0], tile[1] * pairs))
        )
    return given["samples"] * given["out_rows"] * tiled((given["out_H"], given["out_W"]), tile)


def tiled(plane: tuple[int, int], tile: tuple[int, int]) -> int:
    """Voxels of the tiles that cover a plane."""
    return math.prod(blocks(size, block) * block for size, block in zip(plane, tile, strict=True))


def marched(given: dict[str, Any]) -> int:
    """Planes that the marches of `slide` read: of each two more than it has rows, where they exist."""
    planes = 0
    for first in range(0, given["rows"], given["BLOCK_D"]):
        end = min(first + given["BLOCK_D"], given["rows"])
        planes += min(end + 2 + given["offset"], given["D"]) - max(first + given["offset"], 0)
    return planes


def clocks(launch: Launch, code: Code, device: Device) -> tuple[float, float]:
    """(issue, tensor) clocks of the multiprocessor that has most to do: programs are whole."""
    programs = math.prod(launch.grid)
    if "BLOCK_P" in launch.options:  # merges partial rows in two loops over them
        given = arguments(launch)
        issue, tensor = 2 * programs * blocks(given["parts"], given["BLOCK_P"]) * code.issue, 0.0
    else:
        done: Work = work(launch, code.flops)
        parts = computed(launch) / 128
        issue = parts * (code.issue * done.turns + code.around * done.around)
        tensor = parts * done.flops / device.flops_per_clock
    uneven = blocks(programs, device.multiprocessors) / programs
    return issue * uneven, tensor * uneven
