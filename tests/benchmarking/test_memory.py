"""The memory suite's rows: published figures, what was measured, what cannot be."""

import pytest
import torch

from effseg.benchmarking import memory
from effseg.benchmarking.registry import Case, Workload, contenders, missing, workloads

# Bytes per voxel of a step at 1x1x512x512x512, 15 classes, Dice + cross-entropy: bf16, fp32.
PUBLISHED = {
    "unet3d/eager": (2064, 4024),
    "unet3d/checkpoint": (1376, 2738),
    "nnunet/eager": (1126, 2231),
    "nnunet/checkpoint": (762, 1508),
    "nnunet-resenc-m/eager": (1326, 2617),
    "segresnet/eager": (855, 768),
    "stock-effseg-base/eager": (620, 970),
}
OTHERS = ("nnunet/checkpoint", "nnunet-resenc-m/eager")
"""Like one that is predicted anyway: "unet3d/checkpoint" and "nnunet/eager"."""
WHOLE = workloads()["512x512x512, 15 classes"]
SMALL = Workload((64, 32, 32))


def found(name, workload):
    if reason := missing(contenders()[name]):
        pytest.skip(reason)
    return Case(contenders()[name], workload)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in OTHERS else []) for name in PUBLISHED]
)
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_the_table_holds_the_published_figures(name, dtype):
    row = memory.predicted(found(name, WHOLE), dtype)
    published = PUBLISHED[name][dtype == "fp32"]
    assert row.bytes_predicted / row.voxels == pytest.approx(published, rel=0.02)
    assert row.macs > 0


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bar"), [("bf16", 170), ("fp32", 334)])
def test_effsegnet_stays_under_its_bar(dtype, bar):
    report = memory.predict(found("effseg-base/raw/aten", WHOLE), dtype)
    assert 0.9 * bar < report.bytes_per_voxel <= bar


@pytest.mark.parametrize(
    "name", ["stock-effseg-tiny/eager", pytest.param("effseg-tiny/raw/aten", marks=pytest.mark.slow)]
)
def test_what_is_measured_on_a_cpu_is_what_was_predicted(name):
    row = memory.measured(found(name, SMALL), "fp32", torch.device("cpu"))
    assert row.status == "ok"
    assert row.bytes_outside_convolutions == pytest.approx(row.bytes_predicted, rel=0.1)
    assert row.bytes_allocated >= row.bytes_outside_convolutions
    assert row.bytes_reserved is None


def test_what_cannot_be_predicted_or_run_is_a_row_with_the_reason():
    row = memory.predicted(Case(contenders()["unet3d/compile"], SMALL), "fp32")
    assert (row.status, row.bytes_predicted) == ("skipped", None)
    assert "torch.compile" in row.reason
    case = found("effseg-tiny/raw/triton", SMALL)
    row = memory.measured(case, "fp32", torch.device("cpu"))
    assert (row.status, row.reason) == ("skipped", "kernels need a CUDA GPU")
    assert row.bytes_predicted > 0


def test_out_of_memory_is_a_row(monkeypatch):
    def full(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 TiB")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.nn.Module, "to", full)
    row = memory.measured(Case(contenders()["unet3d/eager"], SMALL), "bf16", torch.device("cuda"))
    assert (row.status, row.reason) == ("out of memory", "CUDA out of memory. Tried to allocate 1 TiB")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["effseg-tiny/raw/auto", "unet3d/eager"])
def test_what_is_measured_on_a_gpu_is_what_was_predicted(name, kernel_device):
    row = memory.measured(found(name, Workload((128, 128, 128))), "bf16", kernel_device)
    assert row.bytes_reserved >= row.bytes_allocated
    assert row.bytes_allocated == pytest.approx(row.bytes_predicted, rel=0.25)
