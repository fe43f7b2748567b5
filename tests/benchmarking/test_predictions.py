"""The committed predictions: what is predicted, and that it can be made anew."""

import pytest
from benchmark_records import predicted

from effseg.benchmarking import auto, predictions, tabulation
from effseg.benchmarking.auto import Cell
from effseg.benchmarking.record import read
from effseg.benchmarking.registry import DTYPES
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
