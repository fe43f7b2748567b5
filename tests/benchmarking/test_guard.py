"""The guard: today's figures are no worse than the committed ones, and a planted regression goes red."""

import json
from functools import cache

import pytest
from torch import nn

from benchmarks import guard
from benchmarks.guard import Baseline, Finding, compare
from effseg.benchmarking.registry import Contender, contenders, missing
from effseg.errors import InputError

QUICK = "effseg-base/stream/triton"
ROWS = [
    {"op": "fold", "shape": "C32", "arch": "sm_90", "dtype": "bf16", "issue": 300, "issue_all": 400},
    {"op": "fold", "shape": "C32", "arch": "sm_90", "dtype": "bf16", "issue": 100, "issue_all": 100},
    {"op": "moments", "shape": "C32", "arch": "sm_90", "dtype": "bf16", "issue": 300, "issue_all": 300},
]


# The committed baseline


@pytest.mark.parametrize(
    "name",
    [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in guard.guarded()],
)
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_network_is_no_worse_than_its_baseline(name, dtype):
    if reason := missing(contenders()[name]):
        pytest.skip(reason)
    baseline = guard.part_of(guard.read(guard.BASELINE).networks, [name])
    other = {"bf16": "fp32", "fp32": "bf16"}[dtype]
    before = {figure: value for figure, value in baseline.items() if other not in figure}
    worse = [str(finding) for finding in compare(before, guard.of_network(name, [dtype])) if finding.is_worse]
    assert worse == []


def test_the_baseline_holds_every_guarded_network():
    figures = guard.read(guard.BASELINE).networks
    assert {figure.split(": ")[0] for figure in figures} == set(guard.guarded())


@pytest.mark.slow
def test_kernels_are_no_worse_than_their_baseline():
    triton = pytest.importorskip("triton")
    known = guard.read(guard.BASELINE).kernels
    if triton.__version__ not in known:
        pytest.skip(f"no baseline for Triton {triton.__version__}")
    findings = compare(known[triton.__version__], guard.of_kernels())
    assert [str(finding) for finding in findings if finding.is_worse] == []


# Planted regressions


def network(channels: int, kept: int = 0) -> nn.Module:
    """Two convolutions of so many channels; `kept` layers more, which keep a tensor each, learn nothing."""
    first, last = nn.Conv3d(1, channels, 3, padding=1), nn.Conv3d(channels, 15, 1)
    return nn.Sequential(first, *[nn.SiLU() for _ in range(kept)], last)


@cache
def planted(channels: int, kept: int = 0) -> Contender:
    """The same one for the same network, whose prediction is then made once."""
    return Contender("planted", "eager", "-", lambda _: network(channels, kept))


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """A function that runs the guard's command over a network, against the baseline of network(100)."""
    path = tmp_path / "baseline.json"

    def run(*arguments, **settings):
        contender = planted(**settings)
        monkeypatch.setattr(guard, "contenders", lambda: {contender.name: contender})
        return guard.main(["--baseline", str(path), "--part", "networks", "--jobs", "1", *arguments])

    assert run("--update", channels=100) == 0
    return run


def test_nothing_changed_is_green(plant, capsys):
    capsys.readouterr()
    assert plant(channels=100) == 0
    assert capsys.readouterr().out == "no figure is worse\n"


def test_five_percent_more_channels_are_red(plant, capsys):
    assert plant(channels=105) == 1
    out = capsys.readouterr().out
    parameters = [sum(p.numel() for p in network(channels).parameters()) for channels in (100, 105)]
    assert f"worse: planted/eager: parameters: {parameters[0]} -> {parameters[1]} (+5.0%)" in out
    for figure in ("bytes per voxel in bf16", "bytes per voxel in fp32", "multiply-accumulates per voxel"):
        assert f"worse: planted/eager: {figure}: " in out
    assert out.endswith("4 figures are worse\n")


def test_a_tensor_more_that_is_kept_is_red(plant, capsys):
    assert plant(channels=100, kept=1) == 1
    out = capsys.readouterr().out
    assert "worse: planted/eager: bytes per voxel in bf16: " in out
    assert "parameters" not in out


def test_what_is_better_is_told_and_becomes_the_baseline_when_asked(plant, capsys):
    assert plant(channels=95) == 0
    out = capsys.readouterr().out
    assert "better: planted/eager: parameters: " in out
    assert "--update" in out
    assert plant("--update", channels=95) == 0
    assert plant(channels=100) == 1


def test_a_network_that_is_gone_is_red(plant, monkeypatch, capsys, tmp_path):
    path = tmp_path / "baseline.json"
    data = json.loads(path.read_text())
    data["networks"]["lost/eager: parameters"] = 7
    path.write_text(json.dumps(data))
    assert plant(channels=100) == 1
    assert "gone: lost/eager: parameters: was 7" in capsys.readouterr().out


def test_a_network_whose_package_is_not_here_is_left_as_it_was(plant, monkeypatch, capsys, tmp_path):
    path = tmp_path / "baseline.json"
    before = path.read_text()
    monkeypatch.setattr(guard, "missing", lambda contender: "x is not installed")
    assert plant("--update", channels=105) == 0
    assert path.read_text() == before
    assert "skipped: planted/eager: x is not installed" in capsys.readouterr().out


def test_slower_machine_code_is_red(monkeypatch, tmp_path, capsys):
    triton = pytest.importorskip("triton")
    path = tmp_path / "baseline.json"
    guard.write(path, Baseline({}, {triton.__version__: guard.clocks(ROWS)}))
    arguments = ["--baseline", str(path), "--part", "kernels"]
    monkeypatch.setattr(guard, "of_kernels", lambda jobs: guard.clocks(ROWS))
    assert guard.main(arguments) == 0
    slower = [ROWS[0] | {"issue": 320, "issue_all": 425}, *ROWS[1:]]
    monkeypatch.setattr(guard, "of_kernels", lambda jobs: guard.clocks(slower))
    assert guard.main(arguments) == 1
    out = capsys.readouterr().out
    assert "worse: fold C32 sm_90 bf16: issue clocks: 500 -> 525 (+5.0%)" in out
    assert "worse: fold C32 sm_90 bf16: issue clocks of the main loop: 400 -> 420 (+5.0%)" in out
    assert "moments" not in out


def test_machine_code_of_another_triton_is_not_compared(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    path = tmp_path / "baseline.json"
    guard.write(path, Baseline({}, {"1.0": {}}))
    monkeypatch.setattr(guard, "of_kernels", lambda jobs: guard.clocks(ROWS))
    assert guard.main(["--baseline", str(path), "--part", "kernels"]) == 0
    assert "not compared: kernels: no baseline for Triton" in capsys.readouterr().out


# Comparing, and bad input


def test_half_a_percent_is_the_same():
    assert compare({"a": 1000, "b": 1000}, {"a": 1004.9, "b": 995.1}) == []
    findings = compare({"a": 1000, "b": 1000, "c": 0}, {"a": 994, "b": 1006, "c": 1, "d": 1})
    assert findings == [
        Finding("b", 1000, 1006),
        Finding("c", 0, 1),
        Finding("a", 1000, 994),
        Finding("d", None, 1),
    ]
    assert [finding.is_worse for finding in findings] == [True, True, False, False]


def test_a_fault_of_the_inspector_is_an_error(monkeypatch):
    class Done:
        returncode, stderr = 1, "conv3d_fwd: 2 instructions spill\n"

    monkeypatch.setattr(guard.subprocess, "run", lambda *arguments, **options: Done)
    with pytest.raises(InputError, match="kernels: conv3d_fwd: 2 instructions spill"):
        guard.of_kernels()


@pytest.mark.parametrize("content", [None, "", "[]", '{"schema": 1}', '{"schema": 9, "workload": ""}'])
def test_a_bad_baseline_is_one_line(tmp_path, content, capsys):
    path = tmp_path / "baseline.json"
    if content is not None:
        path.write_text(content)
    assert guard.main(["--baseline", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("guard: error: ")
    assert str(path) in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--jobs", "0"], "--jobs"),
        (["--part", "gpu"], "gpu"),
        (["--contender", "no/such"], "no/such"),
        (["--what"], "--what"),
    ],
)
def test_bad_arguments_are_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        guard.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
