"""Autotuning: what is tried, what is kept of it, and what becomes of its files. Times are made up."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import effseg
from effseg.kernels import heuristics, tuned
from effseg.kernels.choose import choose
from effseg.kernels.config import ATEN, INTERPRETER, LOOPS, Config, Problem
from effseg.kernels.tuned import key
from effseg.models.effsegnet import EffSegNet
from effseg.models.levels import PRESETS, Architecture
from effseg.tuning import autotune, search
from effseg.tuning.autotune import Machine, TunedFile, tune
from effseg.tuning.search import Measurement, Search
from effseg.tuning.trials import Trial, cropped, trial

GPU = "Some GPU"
PROBLEM = Problem("conv3d_fwd", "sm_90", "bf16", 32, 32, (64, 64, 64), (3, 3, 3), gpu="some-gpu")
FIRST = heuristics.heuristic(PROBLEM)
TAP = heuristics.heuristic(PROBLEM, "tap")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A user's cache and a folder of shipped files, both empty; nothing remembered of files read before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.read_tuned.cache_clear()
    yield
    tuned.read_tuned.cache_clear()


@pytest.fixture
def path():
    return tuned.cache_folder() / "some-gpu.json"


def results(value: float = 1.0):
    return (torch.full((1, 2, 3, 4, 5), value),)


@pytest.fixture
def kernels(monkeypatch):
    """What kernels give, by configuration; the right results for those that are not in here."""
    given = {}

    def kernel(candidate):
        found = given.get(candidate, results())
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(search, "trial", lambda problem, device: Trial(results, kernel))
    return given


def timer(seconds):
    """A timer that says seconds(configuration)."""
    return lambda functions: [[seconds(function.args[0])] * 5 for function in functions]


def flat(candidate: Config) -> float:
    """Seconds: the heuristic's configuration is the fastest."""
    return 1.0 if candidate == FIRST else 2.0


def machine(seconds=flat) -> Machine:
    return Machine(GPU, "sm_90", torch.device("cpu"), timer(seconds))


def searched(seconds, most=search.MOST_CANDIDATES, problem=PROBLEM) -> Search:
    return search.search(problem, torch.device("cpu"), timer(seconds), most)


# The search


def test_every_loop_that_can_do_a_convolution_is_tried_and_aten():
    assert FIRST.loop == "slide"
    assert [c.loop for c in search.starts(PROBLEM)] == ["slide", "tap", ATEN]
    strided = dataclasses.replace(PROBLEM, stride=(2, 2, 2))
    assert {c.loop for c in search.starts(strided)} == {"tap", ATEN}
    wgrad = dataclasses.replace(PROBLEM, op="conv3d_wgrad")
    assert {c.loop for c in search.starts(wgrad)} == {"pair3", "pair", "kw", "tap", ATEN}
    wide = dataclasses.replace(wgrad, in_channels=320)
    assert {c.loop for c in search.starts(wide)} == {"tap", ATEN}
    image = dataclasses.replace(PROBLEM, in_channels=1)
    assert "few" in {c.loop for c in search.starts(image)}
    assert search.starts(Problem("fold", "sm_90", "bf16", 32, 32, (8, 8, 8)))[1:] == []


def test_neighbours_change_one_field_and_stay_sensible():
    for around in search.neighbours(FIRST, products=True):
        changed = [
            f.name for f in dataclasses.fields(Config) if getattr(around, f.name) != getattr(FIRST, f.name)
        ]
        assert len(changed) == 1
        assert getattr(FIRST, changed[0])
        assert around.block_h * around.block_w >= 16
        assert around.block_n >= 16
        assert around.num_warps in (1, 2, 4, 8)
        assert 1 <= around.num_stages <= 4


@pytest.mark.usefixtures("kernels")
def test_the_search_climbs_to_the_fastest():
    def seconds(candidate):
        if candidate.loop != "tap":
            return 100.0
        return 1 + abs(math.log2(candidate.block_w / 64)) + abs(candidate.num_stages - 3)

    found = searched(seconds, most=100)
    assert found.best == dataclasses.replace(TAP, block_w=found.best.block_w, num_stages=3)
    assert found.best.block_w == 64
    assert found.dropped == {}
    assert found.measured[found.best] == Measurement(1.0, 0.0)


@pytest.mark.usefixtures("kernels")
def test_the_search_is_bounded_and_aten_may_win():
    met = []

    def seconds(candidate):
        met.append(candidate)
        return 1 / len(met)  # every next one is faster

    assert len(searched(seconds, most=7).measured) == 7
    assert searched(lambda c: 1.0 if c.loop == ATEN else 2.0).best == Config(ATEN)


@pytest.mark.usefixtures("kernels")
def test_kernels_are_tried_on_where_the_first_ones_lose_to_aten():
    found = searched(lambda c: 1.0 if c.loop == ATEN else 32 / c.block_w, most=100)
    assert found.measured[FIRST].median > 1
    assert found.best.block_w > 32


NAN = results()
NAN[0][0, 0, 0, 0, 0] = math.nan
ROW = (torch.ones(1, 2, 1000, 4, 5),)
ROW[0][:, :, 17] = 1.2


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (results(1.1), "relative error 1.0e-01"),
        (NAN, "relative error nan"),
        ((torch.ones(1, 2, 3, 4, 6),), "shape"),
        (RuntimeError("out of resource:\n shared memory"), "RuntimeError: out of resource: shared memory"),
    ],
)
def test_a_wrong_or_failing_candidate_is_dropped_and_listed(kernels, wrong, reason):
    kernels[FIRST] = wrong
    found = searched(flat)  # which would be the fastest by far
    assert FIRST not in found.measured
    assert reason in found.dropped[FIRST]
    assert found.best != FIRST


def test_one_wrong_row_of_a_thousand_shows():
    right = (torch.ones(1, 2, 1000, 4, 5),)
    assert search.disagreement(right, right, "bf16") == ""
    assert "relative error 2.0e-01" in search.disagreement(ROW, right, "bf16")


def test_classes_may_differ_where_two_are_alike():
    classes = (torch.arange(100, dtype=torch.uint8),)
    some, many = (classes[0].clone() for _ in range(2))
    some[:3], many[:50] = 200, 200
    assert search.disagreement((some,), classes, "bf16") == ""
    assert "50.0% of voxels" in search.disagreement((many,), classes, "bf16")


def test_a_problem_that_nothing_solves_leaves_no_entry(kernels, path):
    problem = Problem("fold", "sm_90", "bf16", 32, 32, (8, 8, 8))
    kernels[heuristics.heuristic(problem)] = ValueError("no")
    outcome = tune([problem], machine(), path)
    assert outcome.searches[problem].measured == {}
    assert not path.exists()


# Trials


OPERANDS = [(op, "bf16" if op in ("fold", "norm_act", "moments", "conv3d_fwd") else "fp32") for op in LOOPS]


@pytest.mark.parametrize(("op", "dtype"), OPERANDS)
def test_kernels_and_aten_agree_on_every_trial(op, dtype, kernel_device):
    head, conv = op.startswith("head"), op.startswith("conv3d")
    kernel = (1, 3, 3) if conv else (1, 1, 1)
    stride = (2, 2, 1) if conv else (1, 1, 1)
    problem = Problem(op, INTERPRETER, dtype, 16, 7 if head else 16, (3, 4, 5), kernel, stride, prologue=conv)
    torch.manual_seed(0)
    with torch.no_grad():
        run = trial(problem, kernel_device)
        assert search.disagreement(run(heuristics.heuristic(problem)), run(Config(ATEN)), dtype) == ""


def test_large_problems_are_cut_to_fewer_rows():
    large = dataclasses.replace(PROBLEM, size=(512, 512, 512))
    assert cropped(PROBLEM) == PROBLEM
    assert cropped(large).size == (16, 512, 512)
    # Of both gradients the same part of the volume.
    strided = dataclasses.replace(large, stride=(2, 2, 2), size=(256, 256, 256))
    dgrad = dataclasses.replace(strided, op="conv3d_dgrad", size=(512, 512, 512))
    assert cropped(strided).size[0] / 256 == cropped(dgrad).size[0] / 512


# What a network needs


@pytest.mark.parametrize("memory", ["raw", pytest.param("stream", marks=pytest.mark.slow)])
def test_the_problems_of_a_network(memory, monkeypatch):
    monkeypatch.setattr(autotune, "MEMORY", (memory,))
    monkeypatch.setitem(PRESETS, "small", Architecture((16, 32), (1, 1)))
    monkeypatch.setattr(autotune, "build_model", lambda name, *sizes: EffSegNet(*sizes, preset="small"))
    needed = autotune.problems("effseg-small", (16, 16, 16), ["bf16"], 3, "sm_90")
    assert {p.op for p in needed} == set(LOOPS)
    assert len({key(p) for p in needed}) == len(needed)
    assert {p.architecture for p in needed} == {"sm_90"}
    assert not any(p.op == "conv3d_dgrad" and p.in_channels == 1 for p in needed)
    # Those of fused convolutions, and those that are met where these are left to ATen.
    block = [p for p in needed if p.op == "conv3d_fwd" and (p.in_channels, p.out_channels) == (32, 32)]
    assert {p.prologue for p in block} == {True, False}
    assert needed[0].op.startswith("conv3d")
    # Listing them chooses nothing for good.
    assert choose(PROBLEM) == FIRST


# Tuned files


@pytest.mark.usefixtures("kernels")
def test_what_is_measured_is_chosen(path):
    best = dataclasses.replace(TAP, num_warps=4)
    outcome = tune([PROBLEM], machine(lambda c: 1.0 if c == best else 1.5 if c == TAP else 2.0), path)
    assert choose(PROBLEM) == best
    assert outcome.file.entries == {key(PROBLEM): best}
    document = json.loads(path.read_text())
    assert document["gpu"] == GPU
    assert document["versions"] == tuned.compilers()
    notes = document["entries"][key(PROBLEM)]["measured"]
    assert (notes["median"], notes["spread"], notes["heuristic"], notes["aten"]) == (1.0, 0.0, 2.0, 2.0)
    assert notes["versions"]["effseg"] == effseg.__version__
    assert notes["date"].endswith("+00:00")


@pytest.mark.usefixtures("kernels")
def test_the_users_measurements_come_before_shipped_ones_and_those_before_heuristics(path):
    assert choose(PROBLEM) == FIRST
    shipped = dataclasses.replace(TAP, num_warps=4)
    tune(
        [PROBLEM],
        machine(lambda c: 1.0 if c == shipped else 1.5 if c == TAP else 2.0),
        tuned.SHIPPED / path.name,
    )
    assert choose(PROBLEM) == shipped
    tune([PROBLEM], machine(lambda c: 1.0 if c == TAP else 2.0), path)
    assert choose(PROBLEM) == TAP


@pytest.mark.usefixtures("kernels")
def test_what_was_measured_with_these_versions_is_passed_over(path, monkeypatch):
    other = dataclasses.replace(PROBLEM, dtype="fp32")
    tune([PROBLEM], machine(), path)
    outcome = tune([PROBLEM, other], machine(), path)
    assert (list(outcome.searches), outcome.known) == ([other], 1)
    assert set(json.loads(path.read_text())["entries"]) == {key(PROBLEM), key(other)}
    assert list(tune([PROBLEM], machine(), path, again=True).searches) == [PROBLEM]
    monkeypatch.setattr(autotune, "__version__", "99.0")
    assert list(tune([PROBLEM, other], machine(), path).searches) == [PROBLEM, other]
    assert tune([PROBLEM, other], machine(), path).searches == {}


@pytest.mark.usefixtures("kernels")
def test_only_the_operators_asked_for_are_measured(path):
    other = dataclasses.replace(PROBLEM, op="conv3d_dgrad")
    shown = []
    outcome = tune([PROBLEM, other], machine(), path, ops=["conv3d_dgrad"], show=shown.append)
    assert list(outcome.searches) == shown == [other]
    assert (outcome.known, outcome.left) == (0, 0)


@pytest.mark.usefixtures("kernels")
def test_no_problem_is_begun_after_the_time_limit(path):
    others = [dataclasses.replace(PROBLEM, out_channels=c) for c in (16, 48, 64)]
    now = iter([0.0, 0.0, 59.0, 61.0, 62.0])
    outcome = tune([PROBLEM, *others], machine(), path, seconds=60, clock=lambda: next(now))
    assert list(outcome.searches) == [PROBLEM, others[0]]
    assert outcome.left == 2
    rest = tune([PROBLEM, *others], machine(), path)
    assert (list(rest.searches), rest.known) == (others[1:], 2)


@pytest.mark.usefixtures("kernels")
def test_a_run_that_is_killed_while_it_writes_leaves_the_old_file(path, monkeypatch):
    tune([PROBLEM], machine(), path)
    before = path.read_bytes()

    def killed(self, text, encoding):
        self.write_bytes(text.encode(encoding)[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        tune([dataclasses.replace(PROBLEM, dtype="fp32")], machine(), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("kernels")
def test_what_was_measured_is_written_before_the_next_problem_fails(path):
    def seconds(candidate):
        if candidate.loop == "few":
            raise KeyboardInterrupt
        return flat(candidate)

    image = dataclasses.replace(PROBLEM, in_channels=1)
    with pytest.raises(KeyboardInterrupt):
        tune([PROBLEM, image], machine(seconds), path)
    assert set(TunedFile.read(path, GPU).entries) == {key(PROBLEM)}


def stale(document):
    name, minor = document["versions"]["torch"].split(".")[:2]
    document["versions"]["torch"] = f"{name}.{int(minor) + 1}.0"


def newer(document):
    document["schema"] += 1


def unknown(document):
    del document["versions"]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("change", [stale, newer, unknown])
def test_a_stale_file_is_ignored_with_one_warning_and_measured_anew(path, change):
    tune([PROBLEM], machine(lambda c: 1.0 if c == TAP else 2.0), path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    tuned.read_tuned.cache_clear()
    with pytest.warns(UserWarning, match="some-gpu.json is ignored") as caught:
        assert choose(PROBLEM) == choose(PROBLEM) == FIRST
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="is ignored"):
        outcome = tune([PROBLEM], machine(lambda c: 1.0 if c == TAP else 2.0), path)
    assert list(outcome.searches) == [PROBLEM]
    assert choose(PROBLEM) == TAP


@pytest.mark.usefixtures("kernels")
def test_another_patch_release_reads_the_file_and_measures_again(path, monkeypatch):
    tune([PROBLEM], machine(lambda c: 1.0 if c == TAP else 2.0), path)
    patch = {name: ".".join([*v.split(".")[:2], "99"]) for name, v in tuned.compilers().items()}
    monkeypatch.setattr(tuned, "compilers", lambda: patch)
    tuned.read_tuned.cache_clear()
    assert choose(PROBLEM) == TAP
    assert list(tune([PROBLEM], machine(), path).searches) == [PROBLEM]


# Fused convolutions

FORWARD = dataclasses.replace(PROBLEM, prologue=True, stride=(2, 2, 2))
FUSED = [
    FORWARD,
    dataclasses.replace(FORWARD, op="conv3d_dgrad", size=(128, 128, 128)),
    dataclasses.replace(FORWARD, op="conv3d_wgrad"),
]


@pytest.mark.parametrize(
    ("aten", "wins"),
    [((0.9, 1.5, 1.5), False), ((1.5, 0.9, 0.9), False), ((1.5, 0.5, 0.5), True), ((0.5, 1.1, 1.1), True)],
)
@pytest.mark.usefixtures("kernels")
def test_a_fused_convolution_is_left_to_aten_as_a_whole(path, aten, wins):
    for problem, seconds in zip(FUSED, aten, strict=True):
        tune(FUSED, machine(lambda c, s=seconds: s if c.loop == ATEN else 1.0), path, ops=[problem.op])
    loops = [choose(problem).loop for problem in FUSED]
    assert ATEN not in loops[1:]
    assert (loops[0] == ATEN) is wins


# All of it


def test_a_tiny_problem_in_the_interpreter(path, kernel_device):
    """Real kernels and ATen, times that are made up."""
    problems = [
        Problem("conv3d_fwd", INTERPRETER, "fp32", 16, 16, (2, 4, 8), (1, 3, 3), prologue=True),
        Problem("norm_act_backward", INTERPRETER, "fp32", 8, 8, (2, 4, 8)),
    ]
    wanted = dataclasses.replace(heuristics.heuristic(problems[0]), block_w=16)
    made_up = timer(lambda c: 0.5 if c in (wanted, Config("tile", 0, 0, 16, 8, 0, 4)) else 1.0)
    outcome = tune(problems, Machine(GPU, INTERPRETER, kernel_device, made_up), path, most=4)
    assert [found.dropped for found in outcome.searches.values()] == [{}, {}]
    assert tuned.parse_tuned(path.read_text())[key(problems[0])] == wanted
    assert all(len(found.measured) <= 4 for found in outcome.searches.values())


@pytest.mark.gpu
def test_a_small_problem_on_the_gpu(path):
    here = Machine.here()
    problem = Problem("conv3d_fwd", here.architecture, "bf16", 16, 16, (8, 32, 32), (3, 3, 3), prologue=True)
    found = tune([problem], here, path, most=4).searches[problem]
    assert found.measured
    assert all(0 < m.median < 1 for m in found.measured.values())
    assert found.dropped == {}


def test_only_the_command_measures():
    package = Path(effseg.__file__).parent
    users = {
        path.name
        for folder in (package, package / "kernels")
        for path in folder.rglob("*.py")
        if "import autotune" in path.read_text(encoding="utf-8")
        or "autotune import" in path.read_text(encoding="utf-8")
    }
    # The benchmarks ask which problems there are.
    assert users == {"operators.py", "tune.py"}
