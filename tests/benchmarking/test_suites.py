"""Whole suites: every contender has a row, and why it was not run."""

import pytest
import torch

from effseg.benchmarking import groups, memory, record, suites, throughput
from effseg.benchmarking.journal import Journal
from effseg.benchmarking.record import Row
from effseg.benchmarking.registry import (
    COMPILED,
    DTYPES,
    NO_GPU,
    ONLY_COMPILED,
    ONLY_FULL,
    Workload,
    contenders,
    select,
)
from effseg.benchmarking.timing import Times, filled
from effseg.errors import InputError
from effseg.models.effsegnet import EffSegNet
from effseg.models.levels import PRESETS, Architecture

CPU = torch.device("cpu")
NOT_SELECTED = (ONLY_FULL, ONLY_COMPILED, "not in this suite's selection")


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Measurements of one second, noted; predictions of one byte."""
    noted = []

    def raced(cases, dtype, device, *, tasks, seconds, measure, show):
        noted.append((cases[0].workload.name, dtype, seconds))
        rows = [
            filled(throughput.blank(case, dtype, task), Times((1.0,))) for task in tasks for case in cases
        ]
        for row in rows:
            show(row)

    monkeypatch.setattr(throughput, "rows", raced)
    monkeypatch.setattr(memory, "predicted", lambda case, dtype: memory.blank(case, dtype))
    monkeypatch.setattr(memory, "measured", lambda case, dtype, device: memory.blank(case, dtype))
    return noted


@pytest.fixture
def few_operators(monkeypatch):
    """Those of a network of two levels on a small volume in one memory mode: to list what base asks for
    takes a dozen seconds."""
    pytest.importorskip("triton")
    from effseg.benchmarking import operators
    from effseg.tuning import autotune

    monkeypatch.setitem(PRESETS, "small", Architecture((16, 32), (0, 1)))
    monkeypatch.setattr(autotune, "build_model", lambda name, *sizes: EffSegNet(*sizes, preset="small"))
    monkeypatch.setattr(autotune, "MEMORY", ("raw",))
    monkeypatch.setattr(operators, "LEVELS", (16,))
    small = Workload((16, 16, 16))
    monkeypatch.setattr(suites, "workloads", lambda: {small.name: small})
    monkeypatch.setattr(suites, "OPERATORS", ((small.name,),) * 2)
    operators._asked.cache_clear()
    yield
    operators._asked.cache_clear()


def run(*names, **options):
    return suites.run(names, **({"device": CPU} | options))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("suite", ["memory", "throughput"])
def test_every_contender_has_a_row(suite, full):
    found = run(suite, full=full)
    assert {row.contender for row in found.rows} == contenders().keys()
    selected = {case.contender.name for case in select(suite, full)}
    ran = {row.contender for row in found.rows if row.status == "ok" and row.workload != suites.SMALL.name}
    assert ran == selected
    assert {row.reason for row in found.rows if row.status == "skipped"} <= {
        ONLY_FULL, ONLY_COMPILED, "not in this suite's selection",
    }  # fmt: skip
    assert any(row.reason == ONLY_FULL for row in found.rows) != full


def test_nothing_is_compiled_unless_asked():
    rows = run("throughput", full=True).rows
    compiled = {name for name, contender in contenders().items() if contender.implementation in COMPILED}
    left_out = {row.contender for row in rows if row.reason == ONLY_COMPILED}
    assert left_out
    assert left_out <= compiled
    assert not compiled & {row.contender for row in rows if row.status == "ok"}
    asked = run("throughput", full=True, compiled=True).rows
    assert {row.contender for row in asked if row.status == "ok"} >= left_out
    assert all(row.reason != ONLY_COMPILED for row in asked)


def test_a_record_can_be_written(tmp_path):
    found = run("memory", "throughput")
    record.write(found, tmp_path / "record.json")
    assert record.read(tmp_path / "record.json") == found
    assert found.conditions["suites"] == ["memory", "throughput"]
    assert found.conditions["device"] == "cpu"


def test_on_a_cpu_only_fp32_is_timed_unless_asked(nothing_runs):
    run("throughput")
    assert {dtype for _, dtype, _ in nothing_runs} == {"fp32"}
    run("throughput", dtypes=["bf16"])
    assert {dtype for _, dtype, _ in nothing_runs} == {"fp32", "bf16"}


def test_on_a_cpu_memory_is_predicted_and_some_measured():
    rows = [row for row in run("memory").rows if row.status == "ok"]
    small = suites.SMALL.name
    assert {row.contender for row in rows if row.workload == small} == set(suites.MEASURED_ON_CPU)
    assert {row.dtype for row in rows if row.workload != small} == set(DTYPES)


def test_time_is_shared_and_what_has_not_begun_is_skipped(nothing_runs, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(groups.time, "monotonic", lambda: now[0])

    def show(row):
        now[0] += 1  # a race takes about a minute

    found = run("throughput", full=True, seconds=100, show=show)
    shares = [seconds for _, _, seconds in nothing_runs]
    assert shares[0] == 20
    assert len(shares) < 5
    late = [row for row in found.rows if row.reason == "the time limit was reached"]
    assert {row.workload for row in late} >= {"512x512x128, 105 classes"}
    assert {row.contender for row in found.rows} == contenders().keys()


def test_an_interrupted_run_keeps_what_it_has(nothing_runs, tmp_path):
    shown = []

    def show(row):
        shown.append(row)
        if len(shown) == 3:
            raise KeyboardInterrupt

    found = run("throughput", full=True, show=show)
    assert len(nothing_runs) == 1
    assert found.rows[:3] == tuple(shown[:3])
    assert [row.status for row in found.rows[:4]] == ["ok"] * 3 + ["skipped"]
    assert {row.reason for row in found.rows[3:]} == {
        record.INTERRUPTED, ONLY_COMPILED, "not in this suite's selection",
    }  # fmt: skip
    identities = [(row.contender, row.workload, row.dtype, row.task) for row in found.rows]
    assert len(set(identities)) == len(identities)
    record.write(found, tmp_path / "record.json")


@pytest.mark.usefixtures("few_operators")
def test_kernels_are_listed_without_a_gpu():
    shown = []
    found = run("kernels", seconds=0, show=shown.append)
    assert tuple(shown) == found.rows
    assert {row.reason for row in found.rows} == {"the time limit was reached"}
    assert {row.contender for row in found.rows} > {"fold C16/triton", "layer 16->16 3x3x3/compile"}


def test_operators_that_workloads_share_are_run_once():
    pytest.importorskip("triton")
    rows = run("kernels", full=True, seconds=0).rows
    keys = [(row.contender, row.workload, row.dtype, row.task) for row in rows]
    assert len(keys) == len(set(keys))
    heads = {row.contender for row in rows if row.task == "head_sums"}
    assert heads == {f"head_sums 16->{n}/{how}" for n in (15, 105) for how in ("aten", "triton")}


def test_kernels_without_triton_are_one_row(monkeypatch):
    monkeypatch.setattr(suites, "missing", lambda contender: "triton is not installed")
    (row,) = run("kernels").rows
    assert (row.status, row.reason) == ("skipped", "triton is not installed")


def test_unknown_names_are_told():
    with pytest.raises(InputError, match="suite: expected one of memory, throughput, kernels, got 'speed'"):
        run("speed")
    with pytest.raises(InputError, match="dtype: expected one of bf16, fp32, got 'fp8'"):
        run("memory", dtypes=["fp8"])


def test_the_reason_of_a_kernel_is_the_registrys():
    assert isinstance(NO_GPU, str)
    assert Row("kernels", "x", "y", "fp32", status="skipped", reason=NO_GPU).reason == NO_GPU


def test_a_long_suite_leaves_the_next_its_share(monkeypatch):
    """Time stands still but for what groups take. Of 60 seconds the first suite gets 30."""
    now = [0.0]
    monkeypatch.setattr(groups.time, "monotonic", lambda: now[0])
    given = []

    def group(name, takes):
        row = Row("memory", name, "x", "fp32")

        def run(wanted, seconds, show):
            given.append((name, seconds))
            now[0] += takes
            show(row)

        return groups.Group((row,), run)

    first, second = [group(f"a{i}", 20) for i in range(3)], [group(f"b{i}", 5) for i in range(2)]
    journal = Journal(record.begin())
    groups.measure([first, second], 60, journal, lambda row: None)
    assert [row.status for row in journal.close().rows] == ["ok", "ok", "skipped", "ok", "ok"]
    assert given == [("a0", 10), ("a1", 5), ("b0", 10), ("b1", 15)]


# What a GPU runs


def test_on_a_gpu_low_precision_and_ours_come_first_each_in_its_own_process():
    found = list(suites._groups("throughput", True, False, torch.device("cuda"), None))
    assert all(group.isolated for group in found)
    assert {len({row.contender for row in group.rows}) for group in found} == {1}
    rows = [group.rows[0] for group in found]
    assert [row.dtype for row in rows] == sorted(row.dtype for row in rows)  # bf16, then fp32
    for workload in dict.fromkeys(row.workload for row in rows):
        names = [row.contender for row in rows if (row.workload, row.dtype) == (workload, "bf16")]
        ours = [contenders()[name].is_ours for name in names]
        assert ours == sorted(ours, reverse=True)
        assert any(ours)


@pytest.mark.usefixtures("few_operators")
def test_on_a_gpu_every_operator_has_a_process():
    found = list(suites._groups("kernels", False, False, torch.device("cuda"), ["bf16"]))
    names = [{row.contender.rpartition("/")[0] for row in group.rows} for group in found]
    assert {len(name) for name in names} == {1}
    assert all(group.isolated for group in found)


# Files


def test_a_record_is_on_disk_after_every_row(tmp_path):
    path, seen = tmp_path / "record.json", []

    def show(row):
        seen.append(row)
        assert list(record.read(path).rows) == seen

    run("throughput", path=path, show=show)
    assert len(seen) > 10


def test_a_run_goes_on_from_its_record(nothing_runs, tmp_path):
    path, shown = tmp_path / "record.json", []

    def show(row):
        shown.append(row)
        if len(shown) == 3:
            raise KeyboardInterrupt

    options = {"dtypes": ["bf16", "fp32"], "path": path}
    run("throughput", show=show, **options)
    assert len(nothing_runs) == 1
    found = run("throughput", resume=True, **options)
    assert len(nothing_runs) == 1 + 2  # a race is run together, or not at all
    assert {row.status for row in found.rows if row.reason not in NOT_SELECTED} == {"ok"}
    assert record.read(path).rows == found.rows
    assert run("throughput", resume=True, **options).rows == found.rows
    assert len(nothing_runs) == 3
    run("throughput", **options)
    assert len(nothing_runs) == 3 + 2  # unless asked it begins anew
