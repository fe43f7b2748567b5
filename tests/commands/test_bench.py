"""`effseg bench`'s frame: arguments, the file, what it prints, exit codes."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmark_records import predicted, record, timed

from effseg import benchmarking, cli
from effseg.benchmarking.record import Row, write

ROWS = (
    predicted("unet3d/eager", 2000),
    timed("stock-effseg-base/eager", 2.0),
    timed("effseg-base/raw/auto", 1.0),
    Row("kernels", "fold C32/triton", "64x64x64", "bf16", status="skipped", reason="kernels need a CUDA GPU"),
)
WRONG = Row(
    "throughput", "nnunet/eager", "96x96x96, 15 classes", "fp32", status="wrong", reason="loss 1, not 2"
)


@pytest.fixture
def asked(monkeypatch):
    """What the suites were run with; they give ROWS, or what is put in `rows`."""
    calls = SimpleNamespace(rows=ROWS)

    def run(suites, *, full, compiled, device, dtypes, seconds, path, resume, show):
        calls.suites, calls.options = suites, (full, device, dtypes, seconds)
        calls.written = (compiled, path, resume)
        for row in calls.rows:
            show(row)
        return record(*calls.rows)

    module = SimpleNamespace(run=run)
    monkeypatch.setitem(sys.modules, "effseg.benchmarking.suites", module)
    monkeypatch.setattr(benchmarking, "suites", module, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    return calls


def test_it_measures_and_prints(asked, capsys):
    assert cli.main(["bench", "--device", "cpu"]) == 0
    assert asked.suites == ("memory", "throughput", "kernels")
    assert asked.options == (False, torch.device("cpu"), None, None)
    assert asked.written == (False, None, False)
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == "memory: unet3d/eager, 512x512x512, 15 classes, bf16: ok"
    assert "One training step on 512x512x512, 15 classes, bf16: peak memory" in out
    assert "EffSegNet base, raw" in out
    assert "0.50x" in out
    assert out.endswith("not run: kernels: kernels need a CUDA GPU: 1 (fold C32/triton)\n")


def test_options_are_passed_on(asked):
    options = ["--suite", "memory", "kernels", "--dtype", "fp32", "--minutes", "2", "--full"]
    assert cli.main(["bench", "--device", "cpu", *options]) == 0
    assert asked.suites == ["memory", "kernels"]
    assert asked.options == (True, torch.device("cpu"), ["fp32"], 120)


def test_the_record_is_written_where_it_is_measured(asked, tmp_path):
    path = tmp_path / "new" / "record.json"
    options = ["--device", "cpu", "--compiled", "--resume", "--output", str(path)]
    assert cli.main(["bench", *options]) == 0
    assert asked.written == (True, path, True)


def test_an_interrupted_run_is_exit_code_130(asked, capsys):
    asked.rows = (*ROWS, Row("memory", "unet3d/eager", "x", "bf16", status="skipped", reason="interrupted"))
    assert cli.main(["bench", "--device", "cpu"]) == 130
    assert capsys.readouterr().err.endswith("effseg: interrupted\n")


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_wrong_contender_is_exit_code_1(asked, capsys, status):
    asked.rows = (*ROWS, replace(WRONG, status=status))
    assert cli.main(["bench", "--device", "cpu"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{status}: throughput: nnunet/eager, 96x96x96, 15 classes, fp32: loss 1, not 2"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--suite", "speed"], "--suite"),
        (["--device", "tpu"], "device"),
        (["--output", "record.txt"], "record.txt"),
        (["--output", "."], "."),
        (["--force"], "--force"),
        (["--resume"], "--resume"),
        (["--compare", "a.json"], "--compare"),
        (["--compare", "no-such-a.json", "no-such-b.json"], "no-such-a.json"),
    ],
)
def test_bad_arguments_are_one_line(asked, capsys, arguments, named):
    assert cli.main(["bench", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("effseg: error: ")
    assert named in last
    assert not hasattr(asked, "suites")


@pytest.fixture
def files(tmp_path):
    """Paths of two records, the second slower."""
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    for path, seconds in zip(paths, (1.0, 1.5), strict=True):
        write(record(timed("effseg-base/raw/auto", seconds)), path)
    return [str(path) for path in paths]


def test_a_regression_is_exit_code_1(files, capsys):
    assert cli.main(["bench", "--compare", *files]) == 1
    line, verdict = capsys.readouterr().out.splitlines()
    assert line.startswith("worse: throughput: effseg-base/raw/auto: 96x96x96, 15 classes, fp32, train: ")
    assert line.endswith("seconds_p50: 1 -> 1.5 (+50.0%)")
    assert verdict == "1 figure is worse"


def test_what_is_faster_is_told_and_exit_code_0(files, capsys):
    assert cli.main(["bench", "--compare", *reversed(files)]) == 0
    line, verdict = capsys.readouterr().out.splitlines()
    assert line.startswith("better: ")
    assert verdict == "no figure is worse"


def test_other_machines_are_bad_input_unless_forced(files, tmp_path, capsys):
    other = tmp_path / "other.json"
    write(record(timed("effseg-base/raw/auto", 1.0), gpu="NVIDIA H200"), other)
    assert cli.main(["bench", "--compare", files[0], str(other)]) == 2
    assert capsys.readouterr().err.startswith("effseg: error: compare: expected records of one machine")
    assert cli.main(["bench", "--compare", files[0], str(other), "--force"]) == 0


def test_another_json_is_bad_input(files, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert cli.main(["bench", "--compare", files[0], str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: expected a benchmark record" in line
