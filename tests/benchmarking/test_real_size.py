"""Kernels held against ATen on a GPU's volumes: here in the interpreter, on tiny ones."""

import json
import re

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernel_checks, real_size
from benchmarks.kernel_checks import Check
from effseg.common.isolation import Loss
from effseg.kernels import config, heuristics
from effseg.kernels.choose import answering
from effseg.kernels.config import INTERPRETER, LOOPS, Config, Problem
from effseg.tuning import autotune, trials
from effseg.tuning.problem_lists import Listed, write
from effseg.tuning.trials import Trial

CPU = torch.device("cpu")
CUBE = (3, 3, 3)
FOLD = Problem("fold", INTERPRETER, "bf16", 16, 16, (4, 4, 4))


def problem(op, dtype):
    activates = op.startswith(("conv3d", "head"))
    kernel = CUBE if op.startswith("conv3d") else (1, 1, 1)
    return Problem(op, INTERPRETER, dtype, 16, 16, (3, 4, 8), kernel=kernel, prologue=activates)


@pytest.fixture
def gpu(monkeypatch):
    """The interpreter for a GPU, and one problem."""
    monkeypatch.setattr(real_size, "this_machine", lambda: real_size.Machine(CPU, INTERPRETER, ""))
    monkeypatch.setattr(kernel_checks, "needed", lambda *_: [FOLD])


def use(monkeypatch, kernel):
    """The kernel that every trial has, given what ATen gives."""
    made = trials.trial

    def trial(*arguments, **options):
        run = made(*arguments, **options)
        return Trial(run.aten, lambda _: kernel(*run.aten()))

    monkeypatch.setattr(trials, "trial", trial)


# One kernel


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("op", LOOPS)
def test_right_kernels_are_right(op, dtype):
    found = kernel_checks.check(problem(op, dtype), CPU)
    assert (found.status, found.reason) == ("ok", "")
    assert found.error <= (2 * found.aten_error + kernel_checks.SLACK if dtype == "bf16" else 2e-3)
    assert str(found).startswith(f"{op} {dtype} 16-16 k")


@pytest.mark.parametrize("op", LOOPS)
def test_what_is_exact_has_the_same_operands(op):
    """Else the results would have nothing to do with each other."""
    results = []
    for held in (torch.float32, torch.float64):
        torch.manual_seed(0)
        results.append(trials.trial(problem(op, "fp32"), CPU, held=held).aten())
    for single, double in zip(*results, strict=True):
        assert kernel_checks.distance(single, double) < 1e-4
    assert any(t.dtype == torch.float64 for t in results[1]) or op == "head_argmax"


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (lambda y: (y * 1.1,), "result 0: relative error"),
        (lambda y: (torch.empty_like(y),), "result 0: relative error nan"),
        (lambda y: (y * (1 + 0.01 * torch.rand_like(y)),), "two runs differ"),
        (lambda y: (y * (1 + 0.015),), r"1\.\de-02 from exact, ATen 2\.\de-03"),
        (lambda y: (y[1:],), "result 0: shape"),
        (lambda y: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["wrong", "not written", "random", "inexact", "shape", "raises"],
)
def test_wrong_kernels_are_wrong(monkeypatch, kernel, reason):
    use(monkeypatch, kernel)
    found = kernel_checks.check(FOLD, CPU)
    assert found.status == "wrong"
    assert re.search(reason, found.reason)
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_memory_for_exact_results_atens_must_do(monkeypatch):
    made = trials.trial

    def trial(*arguments, held=None, **options):
        if held is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(*arguments, **options)

    monkeypatch.setattr(trials, "trial", trial)
    found = kernel_checks.check(FOLD, CPU)
    assert (found.status, found.error) == ("ok", None)
    assert str(found).endswith("ok: as ATen; no memory for exact results")


def test_without_memory_for_the_kernel_it_is_told(monkeypatch):
    def kernel(y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    use(monkeypatch, kernel)
    assert kernel_checks.check(FOLD, CPU).status == "out of memory"


# Which kernels


def test_of_problems_of_one_kernel_the_largest_is_run(monkeypatch):
    slab = Problem("fold", "sm_90", "bf16", 16, 16, (2, 64, 64))
    whole = Problem("fold", "sm_90", "bf16", 16, 16, (64, 64, 64))
    monkeypatch.setattr(autotune, "problems", lambda *_: [slab, whole])
    found = kernel_checks.needed((64, 64, 64), "bf16", "sm_90", "")
    assert found[0] == whole
    extra = [p for p in found if p != whole]
    assert {(p.in_channels, p.size[0]) for p in extra} == {(16, 64), (32, 32), (64, 16)}
    assert len(extra) == 3 * 3 * 2


def test_what_a_file_lists_is_not_listed_again(tmp_path, monkeypatch):
    path, volume = tmp_path / "problems.json", (16, 8, 8)
    listed = Listed(kernel_checks.MODEL, volume, "bf16", kernel_checks.CLASSES, "sm_90")
    slab = Problem("fold", "sm_90", "bf16", 16, 16, (2, 8, 8))
    write({listed: [slab]}, path)
    asked = []
    monkeypatch.setattr(autotune, "problems", lambda *arguments: asked.append(arguments) or [])
    machine = real_size.Machine(CPU, "sm_90", "")
    found = real_size._needed(machine, [volume, (4, 4, 4)], ["bf16"], path)
    assert slab in found
    assert [arguments[1] for arguments in asked] == [(4, 4, 4)]


def test_what_was_tuned_is_run_but_not_aten(monkeypatch):
    tuned = Config("tile", block_w=8, block_n=16, splits=2)
    with answering(lambda _: tuned):
        assert kernel_checks.configuration(FOLD) == tuned
    with answering(lambda _: Config(config.ATEN)):
        assert kernel_checks.configuration(FOLD) == heuristics.heuristic(FOLD)


# The command


@pytest.mark.usefixtures("gpu")
def test_a_line_each_and_a_file(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert real_size.main(["--volume", "8x8x8", "--dtype", "bf16", "--json", str(path)]) == 0
    line, summary = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"fold bf16 .*, 4x4x4, tile .*: ok: error \d\.\de-\d\d, ATen's \d\.\de-\d\d", line)
    assert summary == "1 ok"
    document = json.loads(path.read_text())
    assert document["conditions"]["volumes"] == ["8x8x8"]
    (row,) = document["kernels"]
    assert (row["status"], row["size"]) == ("ok", [4, 4, 4])
    assert row["error"] > 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("gpu")
def test_one_wrong_kernel_is_exit_code_1(tmp_path, monkeypatch, capsys):
    use(monkeypatch, lambda y: (y * torch.inf,))
    path = tmp_path / "kernels.json"
    assert real_size.main(["--json", str(path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "4 wrong"
    assert {row["error"] for row in json.loads(path.read_text())["kernels"]} == {None}


@pytest.mark.usefixtures("gpu")
def test_after_the_time_limit_nothing_is_begun(monkeypatch, capsys):
    times = iter([0.0, 1.0, 61.0])
    monkeypatch.setattr(kernel_checks.time, "monotonic", lambda: next(times))
    assert real_size.main(["--minutes", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 ok, 3 not run"


@pytest.mark.usefixtures("gpu")
def test_a_kernel_that_takes_the_gpu_along_costs_no_other(monkeypatch, capsys):
    """The second of four; what is told of the process is this one's."""
    names = iter("abcd")
    monkeypatch.setattr(kernel_checks, "needed", lambda *_: [FOLD])
    processes = []

    def check(problem, device):
        name = next(names)
        if name == "b":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return Check(name, problem.size, "tile", error=0.0, aten_error=0.0)

    def isolated(run, tell, *, silence, seconds):
        processes.append((silence, seconds))
        try:
            run(tell)
        except RuntimeError as error:
            return Loss(str(error))

    cuda = torch.device("cuda")
    monkeypatch.setattr(real_size, "this_machine", lambda: real_size.Machine(cuda, INTERPRETER, ""))
    monkeypatch.setattr(kernel_checks, "check", check)
    monkeypatch.setattr(kernel_checks, "isolated", isolated)
    assert real_size.main(["--minutes", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines[:4]] == ["ok", "failed", "ok", "ok"]
    assert lines[1].endswith("failed: CUDA error: an illegal memory access was encountered")
    assert lines[4] == "3 ok, 1 failed"
    assert len(processes) == 2
    assert all(silence == kernel_checks.SILENCE < seconds for silence, seconds in processes)


@pytest.mark.usefixtures("gpu")
def test_what_was_checked_is_not_checked_again(tmp_path, monkeypatch, capsys):
    path, checked = tmp_path / "kernels.json", []
    made = kernel_checks.check
    monkeypatch.setattr(kernel_checks, "check", lambda *a: checked.append(a) or made(*a))
    options = ["--json", str(path), "--resume", "--volume", "8x8x8", "--dtype", "bf16"]
    assert real_size.main(options) == 0
    before = path.read_text()
    assert real_size.main(options) == 0
    assert len(checked) == 1
    assert json.loads(path.read_text())["kernels"] == json.loads(before)["kernels"]
    document = json.loads(before)
    document["versions"]["triton"] = "1.0"
    path.write_text(json.dumps(document))
    assert real_size.main(options) == 0
    assert len(checked) == 2
    assert f"{path} is of another machine, or of other versions" in capsys.readouterr().out


def test_without_a_gpu_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert real_size.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("real_size: error: kernels need a CUDA GPU, torch ")


@pytest.mark.parametrize("arguments", [["--volume", "128"], ["--minutes", "0"], ["--minutes", "nan"]])
def test_bad_arguments_are_one_line(capsys, arguments):
    assert real_size.main(arguments) == 2
    err = capsys.readouterr().err
    assert arguments[0] in err
    assert err.count("\n") == 1


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    assert real_size.main(["--volume", "48x48x32", "--dtype", "bf16", "--minutes", "1"]) == 0
    assert " ok" in capsys.readouterr().out


def test_a_line_without_errors_still_says_something():
    found = Check("fold", (4, 4, 4), "tile", "wrong", "CompilationError: at 3:4")
    assert str(found) == "fold, 4x4x4, tile: wrong: CompilationError: at 3:4"
