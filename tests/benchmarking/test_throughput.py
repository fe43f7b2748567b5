"""Rows of the throughput suite: figures of what is right, and no times of what is not."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from effseg import EffSegNet
from effseg.benchmarking import gate, registry, throughput
from effseg.benchmarking.gate import Outcome
from effseg.benchmarking.registry import Case, Contender, Workload, contenders, missing
from effseg.models.stock import StockEffSegNet

CPU = torch.device("cpu")
TINY = Workload((48, 48, 48), classes=3)
VOLUMES = {"fp32": TINY.volume, "bf16": (80, 80, 32)}  # with eight voxels at the lowest level, not 2 in a row
OURS, TWIN = "effseg-tiny/raw/aten", "stock-effseg-tiny/eager"


@pytest.fixture(autouse=True, scope="module")
def small_gate():
    gate.verdict.cache_clear()
    gate._expected.cache_clear()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gate, "VOLUMES", VOLUMES)
        yield
    gate.verdict.cache_clear()
    gate._expected.cache_clear()


def planted(make, **fields) -> Contender:
    """Ours by default."""
    usual = {"network": "effseg-tiny", "implementation": "auto", "memory": "raw", "is_ours": True}
    return Contender(**(usual | fields), make=make)


def deaf(classes) -> nn.Module:
    """EffSegNet tiny with an activation of another slope."""
    network = EffSegNet(1, classes, preset="tiny")
    for module in network.modules():
        if hasattr(module, "negative_slope"):
            module.negative_slope = 0.2
    return network


def rows(*found, **options):
    options = {"rounds": 1, "stopwatch": ticking()} | options
    cases = [Case(contenders()[f] if isinstance(f, str) else f, TINY) for f in found]
    return throughput.rows(cases, "fp32", CPU, **options)


def ticking():
    """Turns are run, and take 1, 2, 3 ... seconds."""
    seconds = itertools.count(1)

    def watch(turn):
        turn()
        return float(next(seconds))

    return watch


def test_rows_hold_times_and_sizes():
    shown = []
    found = rows(TWIN, OURS, rounds=3, show=shown.append)
    assert shown == found
    assert [(row.contender, row.task) for row in found] == [
        (TWIN, "train"), (OURS, "train"), (TWIN, "infer"), (OURS, "infer"),
    ]  # fmt: skip
    for row in found:
        assert (row.status, row.reason, row.suite, row.workload) == ("ok", "", "throughput", TINY.name)
        assert row.seconds_p20 < row.seconds_p50 < row.seconds_p80
        assert row.voxels_per_second == TINY.voxels / row.seconds_p50
        assert row.parameters == sum(p.numel() for p in EffSegNet(1, 3, preset="tiny").parameters())
    # Warm-up took seconds 1 and 2; rounds begin with each in turn.
    assert [row.seconds_p50 for row in found[:2]] == [6.0, 5.0]


def test_memory_is_measured_where_asked():
    train, infer = rows(OURS, measure=True)
    assert train.bytes_allocated >= train.bytes_outside_convolutions > 0
    assert infer.bytes_allocated is None


def test_what_computes_something_else_gets_no_time():
    found = rows(planted(deaf), TWIN, tasks=["train"])
    assert [row.status for row in found] == ["wrong", "ok"]
    assert found[0].seconds_p50 is None
    assert "of the loss" in found[0].reason
    assert "of the gradients; at most 2.0e-03" in found[0].reason


def test_an_implementation_is_held_against_its_eager_form():
    def make(classes):
        return StockEffSegNet(1, classes, preset="tiny")

    other = planted(make, network="stock-effseg-tiny", is_ours=False)
    assert gate.reference(other) == contenders()[TWIN]
    assert gate.verdict(other, "fp32", CPU, 3) == ""
    assert gate.reference(contenders()["unet3d/checkpoint"]) == contenders()["unet3d/eager"]
    assert (
        gate.reference(contenders()["effseg-base/stream+1/triton"]) == contenders()["stock-effseg-base/eager"]
    )
    assert gate.reference(contenders()["nnunet/eager"]) is None


def test_an_eager_baseline_must_be_finite():
    def make(classes):
        network = nn.Conv3d(1, classes, 1)
        nn.init.constant_(network.weight, torch.nan)
        return network

    (row,) = rows(planted(make, network="mine", is_ours=False), tasks=["train"])
    assert (row.status, row.reason) == ("wrong", "loss nan, norm of the gradients nan")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ours_pass_the_gate(dtype):
    assert gate.verdict(contenders()[OURS], dtype, CPU, 3) == ""


def test_of_an_outcome_every_part_is_compared():
    exact = Outcome(1.0, torch.ones(100), torch.zeros(100))
    assert gate.disagreement(exact, exact, 1e-3, 0.01) == ""
    assert "2.0e-03 of the loss" in gate.disagreement(exact._replace(loss=1.002), exact, 1e-3, 0.01)
    gradient = torch.ones(100)
    gradient[0] = 1.1
    assert "1.0e-02 of the gradients" in gate.disagreement(
        exact._replace(gradient=gradient), exact, 1e-3, 0.01
    )
    gradient[0] = torch.nan
    assert "nan of the gradients" in gate.disagreement(exact._replace(gradient=gradient), exact, 1e-3, 0.01)
    classes = torch.zeros(100)
    classes[:2] = 1
    assert "2.0% of voxels' classes" in gate.disagreement(exact._replace(classes=classes), exact, 1e-3, 0.01)


def test_what_cannot_run_is_a_row_with_the_reason():
    found = rows("effseg-tiny/raw/triton", OURS, tasks=["train"])
    assert [row.status for row in found] == ["skipped", "ok"]
    assert found[0].reason == missing(contenders()["effseg-tiny/raw/triton"], CPU)


def test_out_of_memory_in_a_turn_is_a_row():
    turns = itertools.count()

    def watch(turn):
        if turn.__self__.contender.name == OURS and next(turns) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return 1.0

    found = rows(TWIN, OURS, tasks=["train"], stopwatch=watch)
    assert [row.status for row in found] == ["ok", "out of memory"]
    assert found[1].reason == "CUDA out of memory. Tried to allocate 1 TiB"
    assert found[1].seconds_p50 is None


def test_what_the_host_cannot_hold_is_not_tried(monkeypatch):
    assert throughput._available() > 2**20
    asked = []
    monkeypatch.setattr(throughput, "_available", lambda: 2.0**20)
    monkeypatch.setattr(
        throughput.memory,
        "predict",
        lambda case, *_: asked.append(case.contender.name) or SimpleNamespace(peak=2**30),
    )
    for row in rows("unet3d/eager", "unet3d/compile", tasks=["train"]):
        assert row.status == "out of memory"
        assert row.reason == "needs 1.00 GiB as predicted, 1.00 MiB are free"
    assert asked == ["unet3d/eager"] * 2


def test_a_race_has_one_workload():
    found = [Case(contenders()[TWIN], workload) for workload in (TINY, Workload((8, 8, 8)))]
    with pytest.raises(ValueError, match="one workload"):
        throughput.rows(found, "fp32", CPU)


@pytest.mark.gpu
def test_a_gpus_memory_is_each_contenders_own(kernel_device):
    cases = [Case(contenders()[name], registry.workloads()["96x96x96, 15 classes"]) for name in (TWIN, OURS)]
    together = throughput.rows(cases, "bf16", kernel_device, rounds=3)
    alone = throughput.rows(cases[1:], "bf16", kernel_device, rounds=3)
    by_task = {row.task: row for row in together if row.contender == OURS}
    for row in alone:
        assert row.status == "ok"
        assert by_task[row.task].bytes_allocated == pytest.approx(row.bytes_allocated, rel=0.02)
        assert row.bytes_reserved >= row.bytes_allocated
