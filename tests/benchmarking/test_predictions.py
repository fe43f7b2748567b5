"""The committed predictions: what is predicted, and that it can be made anew."""

from pathlib import Path

import pytest
from benchmark_records import predicted

from benchmarks import auto, predictions
from benchmarks.auto import Cell
from effseg.benchmarking import memory, tabulation
from effseg.benchmarking.record import read
from effseg.benchmarking.registry import DTYPES, Case, contenders, workloads
from effseg.benchmarking.results import FOLDER


@pytest.fixture
def quick(monkeypatch):
    """Everything needs 100 bytes per voxel, and nothing fits anywhere."""

    def row(case, dtype):
        return predicted(case.contender.name, 100, case.workload.name, dtype=dtype)

    monkeypatch.setattr(predictions.memory, "predicted", row)
    monkeypatch.setattr(auto, "predicted", lambda budget, workload: Cell(budget, "x", otherwise="none"))


def test_both_files_are_written(quick, tmp_path, capsys):
    assert predictions.main(["--output", str(tmp_path)]) == 0
    rows = read(tmp_path / predictions.FILE).rows
    assert len(rows) == len(predictions.cases()) * len(DTYPES)
    assert len(auto.read(tmp_path / auto.FILE)) == len(auto.BUDGETS) * len(auto.WORKLOADS)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "unet3d/eager, 64x64x64, 15 classes, bf16: 0.026 GB"
    assert out[-1] == "80 GB, x: none"


def test_a_folder_that_cannot_be_written_is_one_line(quick, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert predictions.main(["--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("predictions: error: ")


def test_the_committed_ones_are_those_that_would_be_made():
    rows = read(FOLDER / predictions.FILE).rows
    expected = [(*case_names(case), dtype) for case in predictions.cases() for dtype in DTYPES]
    assert [(row.contender, row.workload, row.dtype) for row in rows] == expected
    assert {case.contender.name for case in predictions.cases()} >= set(tabulation.MEMORY_CONTENDERS)


def case_names(case):
    return case.contender.name, case.workload.name


@pytest.mark.parametrize(
    "name", ["effseg-base/raw/auto", pytest.param("effseg-base/stream/auto", marks=pytest.mark.slow)]
)
def test_the_committed_figures_are_not_of_other_networks(name):
    """Of a small volume, which takes seconds; what has changed it has changed the others."""
    case = Case(contenders()[name], workloads()["64x64x64, 15 classes"])
    (committed,) = (row for row in read(FOLDER / predictions.FILE).rows if is_of(row, case, "bf16"))
    assert committed == predictions.memory.predicted(case, "bf16")


def is_of(row, case, dtype):
    return (row.contender, row.workload, row.dtype) == (*case_names(case), dtype)


def test_what_is_committed_needs_no_time_on_a_gpu(monkeypatch):
    """Of ours by ATen it is what was predicted of the algorithm that a CPU takes, which is ATen."""
    monkeypatch.setattr(memory, "predict", None)
    whole = workloads()["512x512x512, 15 classes"]
    rows = {row.contender: row for row in read(FOLDER / predictions.FILE).rows if is_whole(row, whole)}
    auto, aten = (f"effseg-base/raw/{how}" for how in ("auto", "aten"))
    found = memory.known(Case(contenders()[aten], whole), "bf16")
    assert (found.contender, found.bytes_predicted) == (aten, rows[auto].bytes_predicted)
    assert memory.known(Case(contenders()[auto], whole), "bf16") == rows[auto]
    assert memory.known(Case(contenders()["unet3d/compile"], whole), "bf16").bytes_predicted is None
    monkeypatch.setattr(memory.results, "FOLDER", Path("nowhere"))
    memory._committed.cache_clear()
    assert memory.known(Case(contenders()[auto], whole), "bf16").bytes_predicted is None
    memory._committed.cache_clear()


def is_whole(row, workload):
    return (row.workload, row.dtype) == (workload.name, "bf16")
