"""Seconds of the network's operators: our kernels, ATen's, and whole layers beside stock torch's.

pytest benchmarks/test_kernels.py --benchmark-only           on a GPU; without one ATen's at a small size
pytest benchmarks/test_kernels.py --benchmark-only --full    at the sizes of a CT

With --compiled also layers that torch.compile makes.
"""

from __future__ import annotations

import pytest

from effseg.benchmarking import suites
from effseg.benchmarking.registry import DTYPES, workloads

pytest.importorskip("triton")

from effseg.benchmarking import operators

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", dict.fromkeys(name for both in suites.OPERATORS for name in both))
def test_operators(measured, device, full, compiled, name, dtype):
    if name not in suites.OPERATORS[full]:
        pytest.skip("only with --full" if not full else "only without --full")
    if device.type == "cpu" and dtype != "fp32" and not full:
        pytest.skip("only with --full, or on a GPU")
    workload = suites.SMALL if device.type == "cpu" and not full else workloads()[name]
    rows = measured(operators.rows, workload, dtype, device, compiled=compiled)
    assert [(row.contender, row.reason) for row in rows if row.status == "wrong"] == []
    assert any(row.status == "ok" for row in rows)
