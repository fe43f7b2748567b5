"""Rows of the kernels suite, and what they count."""

import dataclasses
import math

import pytest
import torch

from effseg.benchmarking import traffic
from effseg.benchmarking.failure import Failure
from effseg.benchmarking.registry import NO_GPU, ONLY_COMPILED, Workload
from effseg.kernels.config import LOOPS, Problem

pytest.importorskip("triton")

from effseg.benchmarking import operators
from effseg.tuning import autotune, trials

CPU = torch.device("cpu")
TINY = Workload((16, 16, 32), classes=3)
CONV = Problem("conv3d_fwd", "sm_90", "bf16", 16, 32, (4, 6, 8), (3, 3, 3))


@pytest.fixture(scope="module")
def rows():
    """Of what the network asks for in one of its memory modes, which is the same of these operators."""
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "MEMORY", ("raw",))
        operators._asked.cache_clear()
        found = operators.rows(TINY, "fp32", CPU, compiled=False, rounds=1, show=shown.append)
        operators._asked.cache_clear()
    assert shown == found
    return {row.contender: row for row in found}


def test_every_operator_has_a_row_for_each_contender(rows):
    tasks = {row.task for row in rows.values()}
    assert tasks == LOOPS.keys() | {"layer"}
    assert {"conv3d_dgrad 48->48 3x3x3/aten", "fold C16/triton", "head_sums 16->3/aten"} < rows.keys()
    assert {name.rpartition("/")[2] for name in rows} == {"aten", "triton", "eager", "compile"}
    assert rows["conv3d_fwd 32->32 3x3x3/aten"].workload == "8x8x16"
    assert rows["upsample_transpose C16/aten"].workload == "8x8x16"
    assert len(rows) == 2 * (4 * 3 + 6 + 3) + 4 * 4


def test_without_a_gpu_kernels_are_skipped_and_aten_is_timed(rows):
    for name, row in rows.items():
        contender = name.rpartition("/")[2]
        expected = {"triton": ("skipped", NO_GPU), "compile": ("skipped", ONLY_COMPILED)}.get(
            contender, ("ok", "")
        )
        assert (row.status, row.reason) == expected
        assert (row.seconds_p50 is not None) == (row.status == "ok")
        assert row.bytes_moved > 0
        assert (row.macs > 0) == row.task.startswith(("conv3d", "head", "layer"))


def test_what_gives_something_else_is_wrong():
    expected = (torch.ones(1, 2, 3, 4, 5),)
    assert operators._checked(lambda: expected, expected, "fp32")() is expected
    found = operators._checked(lambda: (1.1 * expected[0],), expected, "fp32")
    assert found == Failure("wrong", "result 0: relative error 1.0e-01")

    def fails():
        raise RuntimeError("CUDA error:\nmisaligned address")

    failed = operators._checked(fails, expected, "fp32")
    assert failed == Failure("wrong", "RuntimeError: CUDA error: misaligned address")


def test_a_planted_wrong_kernel_gets_no_time(monkeypatch):
    operator = operators.Operator(
        "fold C16", (4, 4, 4), 1, 0, ("aten", "triton"),
        lambda: {"aten": lambda: None, "triton": Failure("wrong", "result 0: relative error 1.0e-01")},
    )  # fmt: skip
    monkeypatch.setattr(operators, "operators", lambda *_: [operator])
    aten, kernel = operators.rows(TINY, "fp32", CPU, rounds=3)
    assert (aten.status, kernel.status, kernel.seconds_p50) == ("ok", "wrong", None)


def test_where_nothing_can_be_checked_all_have_failed(monkeypatch):
    def make():
        raise torch.OutOfMemoryError("CUDA out of memory")

    operator = operators.Operator("fold C16", (4, 4, 4), 1, 0, ("aten", "triton"), make)
    monkeypatch.setattr(operators, "operators", lambda *_: [operator])
    assert [row.status for row in operators.rows(TINY, "fp32", CPU)] == ["out of memory"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_are_timed_on_a_gpu(dtype, kernel_device):
    found = operators.rows(Workload((64, 64, 64)), dtype, kernel_device, rounds=3)
    assert [(row.contender, row.reason) for row in found if row.status != "ok"] == []


# What is counted


def test_a_convolution_reads_and_writes_everything_once():
    voxels = 4 * 6 * 8
    weights = 16 * 32 * 27
    assert traffic.bytes_moved(CONV) == 2 * (voxels * (16 + 32) + weights)
    wgrad = dataclasses.replace(CONV, op="conv3d_wgrad")
    assert traffic.bytes_moved(wgrad) == 2 * voxels * (16 + 32) + 4 * weights
    dgrad = dataclasses.replace(CONV, op="conv3d_dgrad", prologue=True)
    assert traffic.bytes_moved(dgrad) == 2 * (voxels * (2 * 16 + 32) + weights)
    assert {traffic.macs(p) for p in (CONV, wgrad, dgrad)} == {voxels * weights}


def test_of_a_strided_convolution_the_size_is_the_output_but_for_dgrad():
    strided = dataclasses.replace(CONV, stride=(2, 2, 2))
    dgrad = dataclasses.replace(strided, op="conv3d_dgrad", size=(8, 12, 16))
    assert traffic.macs(strided) == traffic.macs(dgrad) == 4 * 6 * 8 * 16 * 32 * 27
    assert traffic.bytes_moved(strided) == traffic.bytes_moved(dgrad)
    assert traffic.bytes_moved(strided) - traffic.bytes_moved(CONV) == 2 * 7 * 16 * 4 * 6 * 8


@pytest.mark.parametrize("op", LOOPS)
def test_no_less_is_counted_than_the_operands_of_a_run(op):
    """Against the tensors that the operator's trial really gives."""
    problem = Problem(op, "interpreter", "fp32", 16, 16, (4, 4, 4))
    results = trials.trial(problem, CPU).aten()
    written = sum(t.nbytes for t in results if t.dim() >= 3)
    assert traffic.bytes_moved(problem) >= written
    assert traffic.macs(problem) % math.prod(problem.size) == 0


def test_a_layer_is_a_convolution_and_its_gradients():
    assert traffic.layer_macs(16, (4, 6, 8)) == 3 * traffic.macs(dataclasses.replace(CONV, out_channels=16))
    assert traffic.layer_bytes(16, (4, 6, 8), "bf16") == 5 * 16 * 4 * 6 * 8 * 2
