"""Memory of a training step, predicted and measured.

    pytest benchmarks/test_memory.py --benchmark-only           one volume; on a GPU measured there, too
    pytest benchmarks/test_memory.py --benchmark-only --full    every contender on 512x512x{128, 256, 512}

What is timed is the prediction. Without a GPU steps are measured on the CPU at a small size.
"""

from __future__ import annotations

import pytest
import torch

from effseg.benchmarking import memory, suites
from effseg.benchmarking.registry import DTYPES, Case, contenders, select


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = select("memory", *map(metafunc.config.getoption, ("--full", "--compiled")))
        names = [f"{case.contender.name}-{case.workload.name}" for case in cases]
        metafunc.parametrize("case", cases, ids=names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="beside what is measured on the GPU")
def test_predicted(measured, case, dtype):
    (row,) = measured(lambda: [memory.predicted(case, dtype)])
    if row.status == "skipped":
        pytest.skip(row.reason)
    assert row.bytes_predicted > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_measured_on_a_gpu(measured, device, case, dtype):
    (row,) = measured(lambda: [memory.measured(case, dtype, device)])
    if row.status == "skipped":
        pytest.skip(row.reason)
    assert row.status in ("ok", "out of memory"), row.reason


@pytest.mark.parametrize("name", suites.MEASURED_ON_CPU)
def test_measured_on_the_cpu(measured, name):
    """In fp32: the CPU's autocast has other rules than a GPU's. Scratch inside oneDNN's convolutions and
    batch norms is not predicted."""
    case = Case(contenders()[name], suites.SMALL)
    (row,) = measured(lambda: [memory.measured(case, "fp32", torch.device("cpu"))])
    if row.status == "skipped":
        pytest.skip(row.reason)
    assert row.bytes_outside_convolutions == pytest.approx(row.bytes_predicted, rel=0.1)
