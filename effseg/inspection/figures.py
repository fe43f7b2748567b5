"""One row of figures for every kernel of a case: what `effseg.inspection` tabulates.

Issue clocks are those in which one multiprocessor's schedulers hand out the instructions of the interior way,
where nothing is masked, for 128 voxels (of an upsampling: fine ones); tensor clocks those that its tensor
cores need for the same. Either is a lower bound of time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from effseg.inspection import aot
from effseg.inspection.cases import Case, recorded
from effseg.kernels.launch import Launch

SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
"""Bytes that a program may have."""
FLOPS_PER_CLOCK = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}
"""Of a multiprocessor's tensor cores in 16 bits; half as many in TF32."""
TENSOR_INSTRUCTIONS = {"sm_80": ("HMMA",), "sm_90": ("HGMMA",), "sm_100": ("UTC", "HMMA")}
"""How those begin that multiply at full speed."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """For 128 voxels: flops, padding included; turns of the main loop, and of what encloses it."""

    flops: int = 0
    turns: float = 0
    around: float = 0


def work(launch: Launch, main_flops: int) -> Work:
    """What a launch does for 128 voxels, given the flops of a turn of its main loop."""
    constants = launch.options
    if "BLOCK_P" in constants:  # merges partial rows, as many for any volume
        return Work()
    if "BLOCK_V" in constants:
        blocks = math.ceil(constants["C"] / constants["BLOCK_C"])
        return Work(turns=128 / constants["BLOCK_V"] * blocks)
    voxels = constants["BLOCK_H"] * constants["BLOCK_W"]
    if "FACTOR_D" in constants:
        blocks = math.ceil(constants["C"] / constants["BLOCK_C"])
        fine = voxels * math.prod(constants[f"FACTOR_{axis}"] for axis in "DHW")
        return Work(turns=128 / fine * blocks)
    if "CHANNEL_BLOCKS" in constants:  # forward and dgrad
        sharing = constants["CHANNEL_BLOCKS"]
        taps, channels = math.prod(constants.get("TAPS", (3, 3, 3))), constants["C"]
        if launch.kernel.__name__ == "conv3d_few_kernel":
            taps, channels = 1, taps * channels
        depth = taps * math.ceil(channels / constants["BLOCK_K"]) * constants["BLOCK_K"]
        flops = 2 * 128 * depth * sharing * constants["BLOCK_N"]
        march = constants["BLOCK_D"]
    elif (
        "LOOP" in constants
    ):  # wgrad, marching: pairs of voxels hold a product of (4 Ci, 2 Co) for each (kd, kh)
        pairs = constants["LOOP"] != "kw"
        sharing = launch.grid[0]
        products = 64 * 9 if pairs else 128 * 27
        flops = 2 * products * constants["BLOCK_M"] * constants["BLOCK_N"]
        voxels *= 2 if pairs else 1
        march = math.inf
    else:
        sharing = launch.grid[0]
        flops = 2 * 128 * sharing * constants["BLOCK_M"] * constants["BLOCK_N"]
        march = math.inf
    # What encloses the loop is met once for a tile of a plane or, if that is all in the loop, for a march.
    tile = flops * voxels / 128 / sharing
    covered = voxels if main_flops < 0.99 * tile else voxels * march
    return Work(flops, flops / main_flops if main_flops else 0, 128 / covered * sharing)


def rows(case: Case, architecture: str, dtype: str) -> list[Row]:
    """A row for every kernel of a case; one with nothing but its fault where that does not compile."""
    common = {"op": case.op, "shape": case.name, "arch": architecture, "dtype": dtype}
    try:
        launches = recorded(case, architecture, dtype)
        reports = [aot.examined(aot.compiled(launch, architecture)) for launch in launches]
    except Exception as error:  # whatever the compiler raises
        return [{**common, "kernel": "", "fault": _one_line(error)}]
    return [
        common | _figures(launch, report, architecture, dtype) | {"fault": fault(case, report, architecture)}
        for launch, report in zip(launches, reports, strict=True)
    ]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def _figures(launch: Launch, report: aot.Report, architecture: str, dtype: str) -> Row:
    done = work(launch, report.main.flops)
    peak = FLOPS_PER_CLOCK[architecture] / (2 if dtype == "fp32" else 1)
    issue = report.main.issue * done.turns
    return {
        "kernel": launch.kernel.__name__,
        "tiles": {
            name.removeprefix("BLOCK_").removeprefix("num_"): value
            for name, value in launch.options.items()
            if name.startswith(("BLOCK_", "num_"))
        },
        "registers": report.registers,
        "spills": report.spills,
        "shared": report.shared,
        "mma": report.mma,
        "loads": report.main.loads,
        "issue": round(issue),
        "issue_all": round(issue + report.around.issue * done.around),
        "tensor": round(done.flops / peak),
    }


def fault(case: Case, report: aot.Report, architecture: str) -> str:
    """What is wrong with a kernel, or nothing."""
    if report.spills:
        return f"{report.spills} instructions spill registers"
    if report.shared > SHARED_MEMORY[architecture]:
        return f"{report.shared} bytes of shared memory, of {SHARED_MEMORY[architecture]}"
    multiplies = case.op.startswith(("conv3d", "head")) and min(case.in_channels, case.out_channels) >= 16
    # A product of fewer than 64 rows would have to be padded for wgmma, and softmax outweighs the head's.
    rows = case.in_channels * math.prod(case.window.kernel) if case.op == "conv3d_wgrad" else 64
    fast = rows >= 64 and not case.op.startswith("head")
    wanted = TENSOR_INSTRUCTIONS[architecture] if fast else ("H", "UTC")
    if multiplies and not any(name.startswith(wanted) for name in report.mma):
        return "the tensor cores are not used at full speed"
    return ""
