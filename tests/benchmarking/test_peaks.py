"""The least time of an operator on known GPUs."""

import pytest

from effseg.benchmarking.peaks import PEAKS, floor_seconds, peaks
from effseg.benchmarking.record import Row

ROW = Row("kernels", "fold C16/triton", "8x8x8", "bf16", bytes_moved=3_350_000_000, macs=0)


@pytest.mark.parametrize(
    ("gpu", "known"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("NVIDIA A10", "A10"),
    ],
)
def test_gpus_are_known_by_their_names(gpu, known):
    assert peaks(gpu) is PEAKS[known]


@pytest.mark.parametrize(
    "gpu",
    [None, "", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 MIG 1g.10gb"],
)
def test_others_are_unknown(gpu):
    assert peaks(gpu) is None
    assert floor_seconds(ROW, {"gpu": gpu}) is None


def test_the_longer_of_memory_and_arithmetic_is_the_floor():
    machine = {"gpu": "NVIDIA H100 80GB HBM3"}
    assert floor_seconds(ROW, machine) == pytest.approx(1e-3)
    heavy = Row("kernels", "x", "8x8x8", "bf16", bytes_moved=1, macs=989_400_000_000)
    assert floor_seconds(heavy, machine) == pytest.approx(2e-3)
    assert floor_seconds(Row("kernels", "x", "8", "fp32", bytes_moved=1, macs=10**12), machine) > 4e-3
    assert floor_seconds(Row("throughput", "x", "8x8x8", "bf16", macs=10**15), machine) is None


def test_products_of_float32_are_half_as_fast_as_those_of_bf16():
    assert all(peaks.tf32 == pytest.approx(peaks.bf16 / 2, rel=0.02) for peaks in PEAKS.values())
