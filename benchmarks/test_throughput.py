"""Seconds of training steps and of inferences, contenders taking turns.

    pytest benchmarks/test_throughput.py --benchmark-only           what has a bar; on a GPU a selection, too
    pytest benchmarks/test_throughput.py --benchmark-only --full    every selected contender and workload

Machines are noisy, so what counts is the ratio of medians within one race: it is in the report's extra_info,
beside the rows. Bars hold for the CPU; on a GPU nothing is asserted but that results are right.
"""

from __future__ import annotations

import pytest

from effseg.benchmarking import throughput
from effseg.benchmarking.registry import DTYPES, SELECTIONS, Case, contenders, select, workloads

# A compiled network warns of torch's own affairs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
TWIN, RAW, STREAM = "stock-effseg-base/eager", "effseg-base/raw/auto", "effseg-base/stream/auto"
TIME_BARS = {RAW: 1.0, STREAM: 1.25}
"""Of the same network in stock torch: seconds of a training step in fp32."""
MEMORY_BARS = {96: {RAW: 0.45, STREAM: 0.20}, 128: {RAW: 0.45, STREAM: 0.20}}
"""Measured memory, by the volume's edge: of a small one the slabs, thick by default, are a large share."""
LOW_PRECISION_BAR = 1.3
"""Of its time in bf16, which a CPU has few instructions for."""

CONVERTED_BARS = {"raw": 1.1, "block": 1.45}
"""Of the original network's time."""


def cases(names, edge):
    workload = workloads()[f"{edge}x{edge}x{edge}, 15 classes"]
    return [Case(contenders()[name], workload) for name in names]


def trained(rows):
    """Rows of training steps by contender; what is missing here is left out, all else must be right."""
    assert [(row.contender, row.reason) for row in rows if row.status not in ("ok", "skipped")] == []
    return {row.contender: row for row in rows if row.task == "train" and row.status == "ok"}


@pytest.mark.parametrize(("edge", "rounds"), [(96, 5), (128, 3)])
def test_the_same_network_in_stock_torch(benchmark, measured, device, edge, rounds):
    found = cases((TWIN, *TIME_BARS), edge)
    steps = trained(measured(throughput.rows, found, "fp32", device, rounds=rounds, measure=True))
    ratios = {name: _ratios(steps[name], steps[TWIN]) for name in TIME_BARS}
    benchmark.extra_info["ratios of time and memory"] = ratios
    if device.type == "cpu":
        for name, (time, memory) in ratios.items():
            assert time <= TIME_BARS[name], ratios
            assert memory <= MEMORY_BARS[edge][name], ratios


def _ratios(row, twin):
    return row.seconds_p50 / twin.seconds_p50, row.bytes_allocated / twin.bytes_allocated


def test_the_same_network_in_low_precision(benchmark, measured, device):
    steps = trained(
        measured(throughput.rows, cases((TWIN, RAW), 96), "bf16", device, tasks=["train"], rounds=3)
    )
    ratio = steps[RAW].seconds_p50 / steps[TWIN].seconds_p50
    benchmark.extra_info["ratio of time"] = ratio
    assert device.type != "cpu" or ratio <= LOW_PRECISION_BAR


def test_other_networks_are_slower(benchmark, measured, device):
    found = cases((RAW, "unet3d/eager", "nnunet/eager"), 96)
    steps = trained(measured(throughput.rows, found, "fp32", device, tasks=["train"], rounds=3))
    ratios = {name: row.seconds_p50 / steps[RAW].seconds_p50 for name, row in steps.items() if name != RAW}
    benchmark.extra_info["ratios of time"] = ratios
    assert device.type != "cpu" or min(ratios.values()) > 1, ratios


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "workload", sorted({name for both in SELECTIONS["throughput"] for name in both.workloads})
)
def test_selected(measured, device, full, compiled, workload, dtype):
    if device.type == "cpu" and not full:
        pytest.skip("only with --full, or on a GPU")
    found = [case for case in select("throughput", full, compiled) if case.workload.name == workload]
    if not found:
        pytest.skip("only with --full" if not full else "not in the long selection")
    rows = measured(throughput.rows, found, dtype, device, measure=True)
    assert [(row.contender, row.reason) for row in rows if row.status == "wrong"] == []


@pytest.mark.parametrize("network", ["nnunet", "basic-unet"])
def test_a_converted_network(benchmark, measured, device, network):
    found = cases((f"{network}/eager", *(f"{network}/{memory}/auto" for memory in CONVERTED_BARS)), 64)
    steps = trained(measured(throughput.rows, found, "fp32", device, tasks=["train"], rounds=3))
    if not steps:
        pytest.skip(f"{network}'s package is not installed")
    whole = steps[f"{network}/eager"].seconds_p50
    ratios = {memory: steps[f"{network}/{memory}/auto"].seconds_p50 / whole for memory in CONVERTED_BARS}
    benchmark.extra_info["ratios of time"] = ratios
    for memory, bar in CONVERTED_BARS.items():
        assert device.type != "cpu" or ratios[memory] <= bar, ratios
