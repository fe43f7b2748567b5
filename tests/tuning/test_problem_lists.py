"""Lists of problems in files, and the committed ones."""

from itertools import chain, product

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import problems
from effseg.benchmarking.registry import workloads
from effseg.benchmarking.suites import OPERATORS
from effseg.errors import InputError
from effseg.kernels.config import Problem
from effseg.kernels.tuned import key
from effseg.tuning import autotune
from effseg.tuning.problem_lists import Listed, asked, read, write

LISTED = Listed("effseg-base", (8, 8, 4), "bf16", 3, "sm_90")
PROBLEMS = [
    Problem("conv3d_fwd", "sm_90", "bf16", 16, 32, (4, 8, 8), (3, 3, 1), (1, 2, 2), prologue=True),
    Problem("fold", "sm_90", "bf16", 16, 16, (4, 8, 8)),
]


def test_lists_survive_their_file(tmp_path):
    path = tmp_path / "problems.json"
    lists = {LISTED: PROBLEMS, LISTED._replace(volume=(4, 4, 4)): []}
    write(lists, path)
    assert read(path) == lists


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema": 2}', '{"schema": 1, "lists": [{"problems": [["fold"]]}]}']
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "problems.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"problems.json: expected "):
        read(path)


def test_the_committed_lists_are_those_that_are_asked_for():
    found = read(problems.FILE)
    assert list(found) == list(problems.lists())
    assert all(found.values())


def test_the_committed_lists_are_not_of_other_networks_or_kernels(monkeypatch):
    """One of them, in one of its memory modes, for other classes on another architecture: what that asks for
    must be in the file."""
    monkeypatch.setattr(autotune, "MEMORY", ("raw",))
    sample = next(problems.lists())._replace(classes=20, architecture="sm_80")
    known = asked(read(problems.FILE), sample)
    assert known is not None
    assert set(map(key, problems.problems(sample))) <= set(map(key, known))


def test_every_volume_of_the_kernels_suite_is_listed():
    found = read(problems.FILE)
    for dtype, name in product(("bf16", "fp32"), chain(*OPERATORS)):
        workload = workloads()[name]
        assert asked(found, Listed(problems.MODEL, workload.volume, dtype, workload.classes, "sm_120"))
    assert asked(found, Listed("effseg-large", workload.volume, dtype, workload.classes, "sm_90")) is None


@pytest.mark.slow
def test_the_committed_lists_are_those_that_would_be_made():
    found = read(problems.FILE)
    for listed in problems.lists():
        assert found[listed] == problems.problems(listed), listed


# Tuning in processes of their own


def test_a_problem_that_takes_its_process_along_is_lost_and_no_other(tmp_path, monkeypatch):
    """What is told of the process is this one's; the second of three problems ends it."""
    kinds = [Problem("fold", "sm_90", "bf16", 16 * c, 16 * c, (4, 8, 8)) for c in (1, 2, 3)]
    shown, processes = [], []

    def tune(needed, machine, path, *, todo, again, seconds, show):
        outcome = autotune.Outcome(autotune.TunedFile(path, machine.gpu))
        for problem in todo:
            if problem == kinds[1]:
                raise RuntimeError("CUDA error")
            outcome.searches[problem] = autotune.Search()
            show(problem)
        return outcome

    def isolated(run, tell, *, silence):
        processes.append(silence)
        try:
            run(tell)
        except RuntimeError as error:
            return autotune.Loss(str(error))

    monkeypatch.setattr(autotune, "tune", tune)
    monkeypatch.setattr(autotune, "isolated", isolated)
    machine = autotune.Machine("NVIDIA Some GPU", "sm_90", torch.device("cuda"), lambda functions: [])
    found = autotune.tune_isolated(kinds, machine, tmp_path / "x.json", show=shown.append)
    assert shown == kinds
    assert found.lost == {kinds[1]: "CUDA error"}
    assert (list(found.searches), found.known) == ([kinds[2]], 1)
    assert processes == [autotune.SILENCE] * 2
