"""benchmarks/gpu.sh in a checkout of its own, with a python3 that only notes what it is asked for."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PARTS = ["check", "tune", "bench", "accuracy"]
PYTHON = r"""#!/usr/bin/env bash
# FAIL, MISSING: words; NO_GPU: not empty without one.
case "$*" in
  *gpu_slug*) [[ -z ${NO_GPU:-} ]] && echo some-gpu; exit ;;
  "-c import "*) [[ " ${MISSING:-} " != *" ${2#import } "* ]]; exit ;;
esac
echo "$*" >>"$NOTES"
echo "PYTHONPATH=$PYTHONPATH in $PWD" >>"$NOTES.where"
for word in "$@"; do
  case $word in
    effseg.benchmarking.real_size) part=check ;;
    pytest) part=check-tests ;;
    effseg.benchmarking.accuracy) part=accuracy ;;
    tune | bench) part=$word ;;
    */some-gpu.json | */real-size.json) echo '{}' >"$word" ;;
  esac
done
[[ $part == accuracy && -n ${MISSING:-} ]] && echo "skipped: nibabel is not installed" && exit
[[ $part == accuracy ]] && echo '{}' >"${@: -1}/accuracy.json"
[[ $part == tune ]] && mkdir -p kernels/tuned && echo '{"entries": {}}' >kernels/tuned/some-gpu.json
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
            timeout=60,
        )

    def asked(self) -> list[str]:
        """The modules and commands, in order."""
        modules = {"effseg.benchmarking.real_size": "real_size", "effseg.benchmarking.accuracy": "accuracy"}
        found = []
        for line in self.notes.read_text().splitlines():
            module, command = re.match(r"-m (\S+) (\S+)", line).groups()
            found.append(command if module == "effseg" else modules.get(module, module))
        return found


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_all_parts_in_order(checkout):
    done = checkout.run("all")
    assert (done.returncode, done.stderr) == (0, "")
    assert checkout.asked() == ["real_size", "pytest", "tune", "bench", "accuracy"]
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("== ")][:4] == [f"== {part}" for part in PARTS]
    assert lines[-5:] == [f"== some-gpu, results in {checkout.out}", *(f"{part}: ok" for part in PARTS)]


def test_few_files_with_plain_names(checkout):
    for _ in range(2):  # again over what is there
        assert checkout.run("all").returncode == 0
    names = {path.name for path in checkout.out.iterdir()}
    assert names == {
        "real-size.json", "some-gpu.tuned.json", "some-gpu.json", "accuracy.json",
        *(f"gpu-{part}.log" for part in PARTS),
    }  # fmt: skip
    assert len(names) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    shipped = checkout.root / "kernels/tuned/some-gpu.json"
    assert (checkout.out / "some-gpu.tuned.json").read_text() == shipped.read_text()


@pytest.mark.parametrize("part", PARTS)
def test_one_part(checkout, part):
    done = checkout.run(part)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"{part}: ok"
    expected = {"check": ["real_size", "pytest"]}.get(part, [part])
    assert checkout.asked() == expected


def test_what_is_asked_for(checkout):
    checkout.run("all")
    size, tests, tune, bench, accuracy = checkout.notes.read_text().splitlines()
    assert size.endswith(f"--json {checkout.out}/real-size.json")
    assert "--gpu" in tests.split()
    assert {"tests/kernels", "tests/algorithms"} < set(tests.split())
    assert tune == "-m effseg tune --minutes 8 --ship"
    assert bench == f"-m effseg bench --full --minutes 8 --output {checkout.out}/some-gpu.json"
    assert accuracy == f"-m effseg.benchmarking.accuracy --minutes 8 --output {checkout.out}"


@pytest.mark.parametrize(
    ("fails", "part"), [("check", 0), ("check-tests", 0), ("tune", 1), ("bench", 2), ("accuracy", 3)]
)
def test_the_others_go_on_after_a_failed_part(checkout, fails, part):
    done = checkout.run("all", FAIL=fails)
    assert done.returncode == 1
    assert checkout.asked() == ["real_size", "pytest", "tune", "bench", "accuracy"]
    verdicts = [f"{name}: {'failed: exit code 1' if i == part else 'ok'}" for i, name in enumerate(PARTS)]
    assert done.stdout.splitlines()[-4:] == verdicts
    assert (checkout.out / "some-gpu.tuned.json").exists()


def test_what_takes_too_long_is_ended(checkout):
    script = checkout.root / "benchmarks/gpu.sh"
    script.write_text(
        script.read_text().replace("limit 520", "limit 1").replace("--signal=INT", "--signal=TERM")
    )
    done = checkout.run("tune", HANG="tune")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "tune: failed: not done in time"
    assert (checkout.out / "some-gpu.tuned.json").exists()


def test_no_part_takes_nine_minutes():
    text = SCRIPT.read_text()
    limits = {int(seconds) for seconds in re.findall(r"limit (\d+) ", text)}
    assert limits == {270, 235, 520}  # the first two are of one part
    grace = 10
    assert f"--kill-after={grace} " in text
    assert max(270 + grace + 235 + grace, 520 + grace) < 540


def test_what_is_missing_is_listed_as_skipped(checkout):
    done = checkout.run("all", MISSING="hypothesis nibabel xdist")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-6:] == [
        "check: ok",
        "  skipped: the tests: hypothesis is not installed",
        "tune: ok",
        "bench: ok",
        "accuracy: ok",
        "  skipped: nibabel is not installed",
    ]
    assert "pytest" not in checkout.asked()


def test_tests_run_in_parallel_where_they_can(checkout):
    checkout.run("check")
    checkout.run("check", MISSING="xdist")
    parallel, serial = (line for line in checkout.notes.read_text().splitlines() if "-m pytest" in line)
    assert "-n auto" in parallel
    assert "-n auto" not in serial
    assert "xdist" not in serial


@pytest.mark.parametrize("arguments", [(), ("everything",), ("check", "tune"), ("--help",)])
def test_an_unknown_part_is_one_line(checkout, arguments):
    done = checkout.run(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("gpu.sh: expected one of check, tune, bench, accuracy, all; got ")
    assert not checkout.out.exists()


@pytest.mark.parametrize("variables", [{"NO_GPU": "1"}, {"PYTHON": "no-such-python"}])
def test_no_gpu_is_one_line(checkout, variables):
    done = checkout.run("all", **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("gpu.sh: needs an NVIDIA GPU")
    assert not checkout.out.exists()


def test_it_runs_from_anywhere_and_as_a_checkout(checkout, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    assert checkout.run("bench", cwd=elsewhere, OUT="here", PYTHONPATH="/other").returncode == 0
    assert (elsewhere / "here/some-gpu.json").exists()
    where = Path(f"{checkout.notes}.where").read_text()
    assert where == f"PYTHONPATH={checkout.root}:/other in {checkout.root}\n"


def test_results_are_the_checkouts_unless_told(checkout):
    assert checkout.run("bench", OUT="").returncode == 0
    assert (checkout.root / "benchmarks/results/some-gpu.json").exists()


def test_python_may_be_named_relative_to_where_one_is(checkout, tmp_path):
    assert checkout.run("bench", cwd=tmp_path, PYTHON="bin/python3").returncode == 0
    assert checkout.asked() == ["bench"]
