"""Memory of a training step, predicted and measured; rows are in the report's extra_info.

    pytest benchmarks/test_memory.py --benchmark-only           one volume; on a GPU measured there, too
    pytest benchmarks/test_memory.py --benchmark-only --full    every contender on 512x512x{128, 256, 512}

What is timed is the prediction. Without a GPU steps are measured on the CPU at a small size.
"""

from dataclasses import asdict

import pytest
import torch

from effseg.benchmarking import memory
from effseg.benchmarking.registry import DTYPES, Case, contenders, select, workloads

SMALL = workloads()["64x64x64, 15 classes"]
ON_CPU = ("stock-effseg-base/eager", "effseg-base/raw/aten", "effseg-base/stream/aten", "segresnet/eager")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = select("memory", metafunc.config.getoption("--full"))
        names = [f"{case.contender.name}-{case.workload.name}" for case in cases]
        metafunc.parametrize("case", cases, ids=names)


@pytest.mark.parametrize("dtype", DTYPES)
def test_predicted(benchmark, case, dtype):
    row = benchmark.pedantic(memory.predicted, (case, dtype))
    benchmark.extra_info |= asdict(row)
    if row.status == "skipped":
        pytest.skip(row.reason)
    assert row.bytes_predicted > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_measured_on_a_gpu(benchmark, case, dtype):
    row = benchmark.pedantic(memory.measured, (case, dtype, torch.device("cuda")))
    benchmark.extra_info |= asdict(row)
    if row.status == "skipped":
        pytest.skip(row.reason)
    assert row.status in ("ok", "out of memory")


@pytest.mark.parametrize("name", ON_CPU)
def test_measured_on_the_cpu(benchmark, name):
    """In fp32: the CPU's autocast has other rules than a GPU's. Scratch inside oneDNN's convolutions and
    batch norms is not predicted."""
    case = Case(contenders()[name], SMALL)
    row = benchmark.pedantic(memory.measured, (case, "fp32", torch.device("cpu")))
    benchmark.extra_info |= asdict(row)
    if row.status == "skipped":
        pytest.skip(row.reason)
    assert row.bytes_outside_convolutions == pytest.approx(row.bytes_predicted, rel=0.1)
