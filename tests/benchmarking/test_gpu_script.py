"""benchmarks/gpu.sh in a checkout of its own, with a python3 that only notes what it is asked for, or that
runs the steps on a GPU that is not there (fake_gpu.py)."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_steps
from effseg.benchmarking import groups, record
from effseg.benchmarking.journal import Journal, continued

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PARTS = ["first", "steps", "check", "tune", "again", "tests", "accuracy", "more"]
ASKED = ["first", "steps", "real_size", "tune", "again", "pytest", "accuracy", "bench"]
PYTHON = r"""#!/usr/bin/env bash
# FAIL, MISSING: words; NO_GPU: not empty without one; FAKE: the interpreter that runs the steps.
case "$*" in
  *gpu_slug*) [[ -z ${NO_GPU:-} ]] && echo some-gpu; exit ;;
  "-c import "*) [[ " ${MISSING:-} " != *" ${2#import } "* ]]; exit ;;
esac
echo "$*" >>"$NOTES"
echo "PYTHONPATH=$PYTHONPATH in $PWD" >>"$NOTES.where"
if [[ -n ${FAKE:-} && $2 == benchmarks.gpu_steps ]]; then
  exec "$FAKE" -m fake_gpu "${@:2}"
fi
for word in "$@"; do
  case $word in
    benchmarks.real_size) part=check ;;
    pytest) part=tests ;;
    benchmarks.accuracy) part=accuracy ;;
    first | steps | again | tune) part=$word ;;
    bench) part=more ;;
    */some-gpu-tuned.json) [[ -f $word ]] || echo '{}' >"$word" ;;
    */some-gpu.json | */real-size.json) echo '{}' >"$word" ;;
  esac
done
[[ $part == accuracy && -n ${MISSING:-} ]] && echo "skipped: nibabel is not installed" && exit
[[ $part == accuracy ]] && echo '{}' >runs/gpu/accuracy.json
[[ $part == tune ]] && echo '{"entries": {}}' >"$XDG_CACHE_HOME/effseg/tuned/some-gpu.json"
[[ $part == "${HANG:-}" ]] && sleep 60
[[ " ${FAIL:-} " != *" $part "* ]]
"""

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None, reason="bash or coreutils are missing"
)


class Checkout:
    """root: a folder with the script; out: where the results go; notes: what python3 was asked for."""

    def __init__(self, folder: Path) -> None:
        self.root, self.out, self.notes = folder / "checkout", folder / "results", folder / "notes"
        (self.root / "benchmarks").mkdir(parents=True)
        shutil.copy(SCRIPT, self.root / "benchmarks")
        binaries = folder / "bin"
        binaries.mkdir()
        (binaries / "python3").write_text(PYTHON)
        (binaries / "python3").chmod(0o755)
        self.environment = {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "OUT": str(self.out),
        }

    def run(
        self, *arguments: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / "benchmarks/gpu.sh"), *arguments],
            env=self.environment | variables,
            cwd=cwd or self.root.parent,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def asked(self) -> list[str]:
        """The modules and commands, in order."""
        modules = {"benchmarks.real_size": "real_size", "benchmarks.accuracy": "accuracy"}
        found = []
        for line in self.notes.read_text().splitlines():
            module, command = re.match(r"-m (\S+) (\S+)", line).groups()
            by_command = module in ("effseg", "benchmarks.gpu_steps")
            found.append(command if by_command else modules.get(module, module))
        return found


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_all_parts_in_order(checkout):
    done = checkout.run("all")
    assert (done.returncode, done.stderr) == (0, "")
    assert checkout.asked() == ASKED
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("== ")][:-1] == [f"== {part}" for part in PARTS]
    assert lines[-9:] == [f"== some-gpu, results in {checkout.out}", *(f"{part}: ok" for part in PARTS)]


def test_few_files_with_plain_names(checkout):
    for _ in range(2):  # again over what is there
        assert checkout.run("all").returncode == 0
    names = {path.name for path in checkout.out.iterdir()}
    assert names == {
        "some-gpu.json", "some-gpu-tuned.json", "some-gpu-configurations.json", "real-size.json",
        "accuracy.json", "gpu.log",
    }  # fmt: skip
    assert len(names) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    shipped = checkout.root / "kernels/tuned/some-gpu.json"
    assert (checkout.out / "some-gpu-configurations.json").read_text() == shipped.read_text()


@pytest.mark.parametrize("part", PARTS)
def test_one_part(checkout, part):
    (checkout.root / "kernels/tuned").mkdir(parents=True)
    (checkout.root / "kernels/tuned/some-gpu.json").write_text("{}")
    done = checkout.run(part)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"{part}: ok"
    assert checkout.asked() == [ASKED[PARTS.index(part)]]


def test_some_parts(checkout):
    checkout.run("steps", "first")
    assert checkout.asked() == ["steps", "first"]


def test_what_is_asked_for(checkout):
    checkout.run("all")
    first, steps, size, tune, again, tests, accuracy, bench = checkout.notes.read_text().splitlines()
    state = checkout.root / "runs/gpu"
    problems = "--problems benchmarks/problems.json"
    for line, part, name in ((first, "first", ""), (steps, "steps", ""), (again, "again", "-tuned")):
        assert line.startswith(f"-m benchmarks.gpu_steps {part} --minutes ")
        assert line.endswith(f"--output {state}/some-gpu{name}.json")
    assert "--dtype bf16" in size
    assert size.endswith(f"{problems} --json {state}/real-size.json --resume")
    assert tune == f"-m effseg tune --dtype bf16 --minutes 8.50 {problems}"
    assert "--gpu" in tests.split()
    assert {"tests/kernels", "tests/algorithms"} < set(tests.split())
    assert accuracy == f"-m benchmarks.accuracy --minutes 8.50 --output {state} --resume"
    assert "-m effseg bench --full --suite kernels throughput" in bench
    assert bench.endswith(f"--output {state}/some-gpu-tuned.json --resume")


@pytest.mark.parametrize("fails", PARTS)
def test_the_others_go_on_after_a_failed_part(checkout, fails):
    done = checkout.run("all", FAIL=fails)
    assert done.returncode == 1
    assert checkout.asked() == ASKED
    verdicts = [f"{part}: {'failed: exit code 1' if part == fails else 'ok'}" for part in PARTS]
    assert done.stdout.splitlines()[-8:] == verdicts
    assert (checkout.out / "some-gpu-configurations.json").exists()


def test_what_takes_too_long_is_ended(checkout):
    script = checkout.root / "benchmarks/gpu.sh"
    text = script.read_text().replace("[tune]=540", "[tune]=1").replace("least=60", "least=1")
    script.write_text(text.replace("--signal=INT", "--signal=TERM"))
    done = checkout.run("tune", HANG="tune")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "tune: failed: not done in time"
    assert (checkout.out / "some-gpu-configurations.json").exists()


def test_no_part_takes_nine_and_a_half_minutes():
    text = SCRIPT.read_text()
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", text))
    assert list(limits) == PARTS
    grace = 10
    assert f"--kill-after={grace} " in text
    assert max(map(int, limits.values())) + grace < 570


def test_all_of_it_takes_as_long_as_it_may(checkout):
    done = checkout.run("all", MINUTES="1")
    assert not checkout.notes.exists()  # less than what a part is begun for
    assert done.stdout.splitlines()[-8:] == [f"{part}: not begun: call it again" for part in PARTS]
    assert done.returncode == 0
    checkout.run("all", MINUTES="3")
    first = checkout.notes.read_text().splitlines()[0]
    assert 1.5 < float(re.search(r"--minutes (\S+)", first)[1]) < 2.5


def test_a_run_goes_on_from_the_last_one(checkout, tmp_path):
    checkout.run("all", OUT=str(tmp_path / "first"))
    checkout.run("first", OUT=str(tmp_path / "second"))
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert {path.name for path in (tmp_path / "second").iterdir()} == names
    checkout.notes.write_text("")
    checkout.run("tests")
    assert checkout.asked() == []  # passed
    shutil.rmtree(checkout.root / "runs")
    shutil.rmtree(checkout.root / "kernels")
    checkout.run("again", RESUME=str(tmp_path / "first"))
    assert checkout.asked() == ["again"]  # with what was tuned


def test_tests_that_fail_are_run_again(checkout):
    checkout.run("tests", FAIL="tests")
    checkout.run("tests")
    assert checkout.asked() == ["pytest"] * 2


def test_results_come_back_from_a_run_that_is_killed(checkout):
    with subprocess.Popen(
        ["bash", str(checkout.root / "benchmarks/gpu.sh"), "steps"],
        env=checkout.environment | {"HANG": "steps"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as run:
        path, until = checkout.out / "some-gpu.json", time.monotonic() + 30
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.1)
        os.killpg(run.pid, 9)
    assert path.read_text() == "{}\n"


def test_what_is_missing_is_listed_as_skipped(checkout):
    done = checkout.run("all", MISSING="hypothesis nibabel xdist")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-10:] == [
        *(f"{part}: ok" for part in PARTS[:6]),
        "  skipped: the tests: hypothesis is not installed",
        "accuracy: ok",
        "  skipped: nibabel is not installed",
        "more: ok",
    ]
    assert "pytest" not in checkout.asked()


def test_our_steps_are_not_repeated_where_nothing_was_tuned(checkout):
    done = checkout.run("again", "more")
    assert done.returncode == 0
    assert "  skipped: our steps once more: nothing is tuned" in done.stdout.splitlines()
    (bench,) = checkout.notes.read_text().splitlines()
    assert "/some-gpu.json --resume" in bench


def test_tests_run_in_parallel_where_they_can(checkout):
    checkout.run("tests", FAIL="tests")
    checkout.run("tests", MISSING="xdist")
    parallel, serial = checkout.notes.read_text().splitlines()
    assert "-n auto" in parallel
    assert "-n auto" not in serial
    assert "xdist" not in serial


@pytest.mark.parametrize("arguments", [(), ("everything",), ("check", "speed"), ("--help",), ("all", "tune")])
def test_an_unknown_part_is_one_line(checkout, arguments):
    done = checkout.run(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"gpu.sh: expected all, or some of {' '.join(PARTS)}; got ")
    assert not checkout.out.exists()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"NO_GPU": "1"}, "needs an NVIDIA GPU"),
        ({"PYTHON": "no-such-python"}, "needs an NVIDIA GPU"),
        ({"MINUTES": "soon"}, "MINUTES: expected a whole number of minutes, got 'soon'"),
        ({"RESUME": "nowhere"}, "RESUME: expected a folder of earlier results, got 'nowhere'"),
    ],
)
def test_what_it_cannot_do_is_one_line(checkout, variables, line):
    done = checkout.run("all", **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"gpu.sh: {line}")
    assert not checkout.out.exists()


def test_it_runs_from_anywhere_and_as_a_checkout(checkout, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    assert checkout.run("steps", cwd=elsewhere, OUT="here", PYTHONPATH="/other").returncode == 0
    assert (elsewhere / "here/some-gpu.json").exists()
    where = Path(f"{checkout.notes}.where").read_text()
    assert where == f"PYTHONPATH={checkout.root}:/other in {checkout.root}\n"


def test_results_are_the_checkouts_unless_told(checkout):
    assert checkout.run("steps", OUT="").returncode == 0
    assert (checkout.root / "benchmarks/results/some-gpu.json").exists()


def test_python_may_be_named_relative_to_where_one_is(checkout, tmp_path):
    assert checkout.run("more", cwd=tmp_path, PYTHON="bin/python3").returncode == 0
    assert checkout.asked() == ["bench"]


# On a GPU that is not there

OURS = [f"effseg-base/{memory}/{how}" for how in ("aten", "triton") for memory in ("raw", "stream")]
OTHERS = ["nnunet/eager", "stock-effseg-base/eager"]
STEPS = [
    (name, f"{volume}, 15 classes")
    for names in (OURS, OTHERS)
    for volume in ("512x512x256", "512x512x512")
    for name in names
]
"""The most valuable first."""
SOURCES = {"FAKE": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.fixture
def fake(checkout, tmp_path):
    """A checkout whose steps run on a GPU that is not there; measured: the file of what was, in order."""
    checkout.environment |= SOURCES | {"FAKE_NOTES": str(tmp_path / "measured"), "HOME": str(tmp_path)}
    checkout.measured = tmp_path / "measured"
    return checkout


@pytest.mark.long
def test_faults_cost_a_row_each(fake):
    """One that stays in the third, the process's end in the fifth, no memory in the seventh."""
    done = fake.run("steps", FAULTS="3:sticky 5:abort 7:oom")
    assert done.returncode == 1
    assert "steps: 12 of 12 rows are in " in done.stdout
    rows = record.read(fake.out / "some-gpu.json").rows
    assert [(row.contender, row.workload) for row in rows] == STEPS
    assert {(row.suite, row.task, row.dtype) for row in rows} == {("throughput", "train", "bf16")}
    failed = {2: "failed", 4: "failed", 6: "out of memory"}
    assert [row.status for row in rows] == [failed.get(i, "ok") for i in range(12)]
    assert rows[2].reason == "RuntimeError: CUDA error: device-side assert triggered"
    assert rows[4].reason.startswith("its process ended: SIGABRT: terminate called")
    assert rows[6].reason == "CUDA out of memory. Tried to allocate 1 TiB"
    for row in rows:
        figures = (row.seconds_p50, row.bytes_allocated, row.bytes_reserved)
        assert all(figure is not None for figure in figures) == (row.status == "ok")
    assert rows[0].bytes_predicted > 0
    assert fake.measured.read_text().splitlines() == [f"{name}, {size}, train" for name, size in STEPS]


@pytest.mark.slow
def test_a_killed_run_has_what_it_measured_and_goes_on(fake, tmp_path, monkeypatch):
    path, hung = tmp_path / "rows.json", tmp_path / "measured.hung"
    command = [sys.executable, "-m", "fake_gpu", "benchmarks.gpu_steps", "steps", "--output", str(path)]
    with subprocess.Popen(
        command, env=os.environ | fake.environment | {"FAULTS": "3:hang"}, stdout=subprocess.DEVNULL
    ) as run:
        until = time.monotonic() + 300
        while not hung.exists() and time.monotonic() < until:
            time.sleep(0.05)
        run.kill()
    kept = record.read(path)
    assert [(row.contender, row.workload, row.status) for row in kept.rows] == [
        (*step, "ok") for step in STEPS[:2]
    ]
    process = int(hung.read_text())
    while Path(f"/proc/{process}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()  # what it had started ended with it

    wanted = []
    monkeypatch.setattr(groups, "isolated", lambda run, tell, **_: wanted.extend(run.args[-2]))
    journal = Journal(continued(kept, path), path)
    groups.measure([list(gpu_steps.groups("steps", torch.device("cuda")))], 60, journal, lambda row: None)
    assert [(row.contender, row.workload) for row in wanted] == STEPS[2:]


@pytest.mark.slow
def test_all_parts_with_a_fault_in_the_third_row(fake):
    """The doctor and two comparisons come first: the second of those is lost."""
    done = fake.run("all", FAULTS="3:sticky")
    assert done.returncode == 1
    rows = record.read(fake.out / "some-gpu.json").rows
    assert [row.contender for row in rows[:3]] == [
        "doctor", "effseg-base/raw/triton", "effseg-base/stream/triton",
    ]  # fmt: skip
    assert [(row.contender, row.workload) for row in rows[3:]] == STEPS
    assert [row.status for row in rows] == ["ok", "ok", "failed", *["ok"] * 12]
    tuned = record.read(fake.out / "some-gpu-tuned.json")
    assert [(row.contender, row.workload) for row in tuned.rows] == STEPS[:8]
    assert tuned.conditions["tuned"]
    assert {row.status for row in tuned.rows} == {"ok"}
    measured = fake.measured.read_text()
    assert fake.run("all").returncode == 1  # the fault is known, and
    assert fake.measured.read_text() == measured  # nothing is measured twice
    assert json.loads((fake.out / "some-gpu.json").read_text())["conditions"]["commits"]
