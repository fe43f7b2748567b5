"""What may not get worse, on any machine and without a GPU: `python -m benchmarks.guard`.

Figures that are the same on every run (predicted memory, parameters, arithmetic, and the issue clocks of the
kernels' machine code) against those of benchmarks/baseline.json, smaller being better for all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from effseg.benchmarking.memory import predict
from effseg.benchmarking.registry import DTYPES, Case, contenders, missing, workloads
from effseg.common.arguments import Parser
from effseg.common.atomic import atomic_path
from effseg.errors import InputError

BASELINE = Path(__file__).parent / "baseline.json"
SCHEMA = 1
WORKLOAD = "512x512x512, 15 classes"
TOLERANCE = 0.005
"""Relative; a figure that differs by no more is the same."""
IMPLEMENTATIONS = ("eager", "checkpoint", "aten", "triton")
"""The guarded ones: of the others, memory is either that of one of these or not predictable."""
PARTS = ("networks", "kernels")
ARCHITECTURE = "sm_90"

Figures = dict[str, float]


@dataclass(frozen=True)
class Baseline:
    """networks: by contender and figure; kernels: by the version of Triton, whose machine code differs, then
    by kernel and figure."""

    networks: Figures
    kernels: dict[str, Figures]


@dataclass(frozen=True)
class Finding:
    """A figure that is not what it was; None where it was not, or is no longer."""

    name: str
    before: float | None
    now: float | None

    @property
    def is_worse(self) -> bool:
        return self.now is None or (self.before is not None and self.now > self.before)

    def __str__(self) -> str:
        if self.before is None:
            return f"new: {self.name}: {self.now:.10g}"
        if self.now is None:
            return f"gone: {self.name}: was {self.before:.10g}"
        change = f"{self.now / self.before - 1:+.1%}" if self.before else "from nothing"
        verdict = "worse" if self.is_worse else "better"
        return f"{verdict}: {self.name}: {self.before:.10g} -> {self.now:.10g} ({change})"


def compare(before: Figures, now: Figures) -> list[Finding]:
    """What differs by more than TOLERANCE, and what one of them lacks, the worse first."""
    found = [
        Finding(name, before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if name not in before or name not in now or abs(now[name] - before[name]) > TOLERANCE * before[name]
    ]
    return sorted(found, key=lambda finding: not finding.is_worse)


# Figures of networks


def guarded() -> list[str]:
    """Names of the contenders whose figures are guarded."""
    return [name for name, contender in contenders().items() if contender.implementation in IMPLEMENTATIONS]


def of_network(name: str, dtypes: Sequence[str] = DTYPES) -> Figures:
    """Figures of one contender that is not `missing`, each named "contender: figure"."""
    case = Case(contenders()[name], workloads()[WORKLOAD])
    figures: Figures = {}
    for dtype in dtypes:
        report = predict(case, dtype)
        figures[f"{name}: bytes per voxel in {dtype}"] = round(report.bytes_per_voxel, 2)
        figures[f"{name}: parameters"] = report.parameters
        if report.macs and case.contender.implementation != "triton":
            figures[f"{name}: multiply-accumulates per voxel"] = round(report.macs / report.voxels, 1)
    return figures


def of_networks(names: Sequence[str], jobs: int) -> Figures:
    if jobs == 1:
        return {key: value for name in names for key, value in of_network(name).items()}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return {key: value for found in pool.map(of_network, names) for key, value in found.items()}


def part_of(figures: Figures, names: Iterable[str]) -> Figures:
    """The figures of these contenders."""
    chosen = set(names)
    return {name: value for name, value in figures.items() if name.split(": ")[0] in chosen}


# Figures of kernels


def of_kernels(jobs: int = 1) -> Figures:
    """Compiles the kernels of a layer of 32 channels: half a minute."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "effseg.inspection", "--quick", "--arch", ARCHITECTURE]
        # A process of its own: where kernels were imported as interpreted ones they cannot be compiled.
        done = subprocess.run(
            [*command, "--jobs", str(jobs), "--json", str(path)], capture_output=True, text=True
        )
        if done.returncode:
            raise InputError(f"kernels: {' '.join(done.stderr.split()) or 'the inspector failed'}")
        return clocks(json.loads(path.read_text(encoding="utf-8"))["rows"])


def clocks(rows: Iterable[dict[str, Any]]) -> Figures:
    """Issue clocks per 128 voxels of the inspector's rows, of all kernels that a case launches together."""
    figures: Figures = {}
    for row in rows:
        name = f"{row['op']} {row['shape']} {row['arch']} {row['dtype']}"
        for column, what in (("issue", "issue clocks of the main loop"), ("issue_all", "issue clocks")):
            key = f"{name}: {what}"
            figures[key] = figures.get(key, 0) + row[column]
    return figures


# The baseline's file


def read(path: Path) -> Baseline:
    """Raises InputError for a file that is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA or data["workload"] != WORKLOAD:
            raise InputError(f"{path}: expected schema {SCHEMA} of {WORKLOAD}; write it anew with --update")
        return Baseline(data["networks"], data["kernels"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a baseline of this guard, got {error!r}") from None


def write(path: Path, baseline: Baseline) -> None:
    data = {
        "schema": SCHEMA,
        "workload": WORKLOAD,
        "networks": dict(sorted(baseline.networks.items())),
        "kernels": {
            version: dict(sorted(baseline.kernels[version].items())) for version in sorted(baseline.kernels)
        },
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# The command


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.guard",
        description=f"""Compares predicted bytes per voxel ({WORKLOAD}), parameters and multiply-accumulates
            of every contender, and the kernels' issue clocks, with a baseline. Exit code 1 if one is worse by
            more than {TOLERANCE:.1%} or gone. What is better, or new, is told; --update makes it the
            baseline.""",
    )
    parser.add_argument("--update", action="store_true", help="write what is found here to the baseline")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="default: benchmarks/baseline.json")
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=" or ".join(PARTS)
    )
    parser.add_argument("--contender", nargs="+", metavar="NAME", help="only these networks")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    unknown = sorted(set(args.contender or ()) - set(guarded()))
    if unknown:
        parser.error(f"--contender: {', '.join(unknown)} not guarded; known are {', '.join(guarded())}")
    try:
        return _run(args)
    except (InputError, OSError) as error:
        print(f"guard: error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    baseline = Baseline({}, {}) if args.update and not args.baseline.exists() else read(args.baseline)
    findings: list[Finding] = []
    if "networks" in args.part:
        baseline, found = _networks(baseline, args.contender, args.jobs)
        findings += found
    if "kernels" in args.part:
        baseline, found = _kernels(baseline, args.jobs)
        findings += found
    for finding in findings:
        print(finding)
    if args.update:
        write(args.baseline, baseline)
        print(f"written: {args.baseline}")
        return 0
    worse = sum(finding.is_worse for finding in findings)
    if len(findings) > worse:
        print("better or new figures: `python -m benchmarks.guard --update` keeps them")
    print(f"{worse} figures are worse" if worse else "no figure is worse")
    return 1 if worse else 0


def _networks(baseline: Baseline, names: Sequence[str] | None, jobs: int) -> tuple[Baseline, list[Finding]]:
    """The baseline with what is found now, and what differs; a `missing` contender is left as it was."""
    reasons = {name: missing(contenders()[name]) for name in names or guarded()}
    for name, reason in reasons.items():
        if reason:
            print(f"skipped: {name}: {reason}")
    now = of_networks([name for name, reason in reasons.items() if reason is None], jobs)
    left = part_of(baseline.networks, (name for name, reason in reasons.items() if reason))
    looked_at = part_of(baseline.networks, names) if names else baseline.networks
    before = {name: value for name, value in looked_at.items() if name not in left}
    kept = {name: value for name, value in baseline.networks.items() if name not in before}
    return Baseline(kept | now, baseline.kernels), compare(before, now)


def _kernels(baseline: Baseline, jobs: int) -> tuple[Baseline, list[Finding]]:
    """Likewise. Another version of Triton makes other machine code: there is no comparing across."""
    try:
        import triton
    except ImportError:
        print("skipped: kernels: triton is not installed")
        return baseline, []
    version: str = triton.__version__
    now = of_kernels(jobs)
    if version not in baseline.kernels:
        known = ", ".join(baseline.kernels) or "none"
        print(f"not compared: kernels: no baseline for Triton {version}, only for {known}")
    found = compare(baseline.kernels[version], now) if version in baseline.kernels else []
    return Baseline(baseline.networks, baseline.kernels | {version: now}), found


if __name__ == "__main__":
    sys.exit(main())
