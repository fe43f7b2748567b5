"""`python -m benchmarks.real_size`: whether this GPU's kernels are right on volumes of real size."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from effseg.benchmarking import record
from effseg.benchmarking.registry import DTYPES, NO_GPU
from effseg.common.arguments import Parser
from effseg.common.atomic import atomic_path
from effseg.errors import InputError
from effseg.memory.units import parse_volume

if TYPE_CHECKING:
    from benchmarks.kernel_checks import Check
    from effseg.kernels.config import Problem

VOLUMES = ("128x128x128", "512x512x64")

HELP = """Run every kernel that a training step and a segmentation of effseg-base launch on these volumes, and
convolutions of 16, 32 and 64 channels, and compare it with ATen. A line each. Exit code 1 if one is wrong,
does not compile, or does not fit into the GPU's memory; 2 without a GPU."""


class Machine(NamedTuple):
    """architecture and gpu: as in `effseg.kernels.config.Problem`."""

    device: torch.device
    architecture: str
    gpu: str


def this_machine() -> Machine:
    """Raises InputError without a GPU, or without Triton."""
    if not torch.cuda.is_available():
        raise InputError(f"{NO_GPU}, torch {torch.__version__} finds none")
    try:
        from effseg.kernels.launch import architecture
        from effseg.kernels.tuned import gpu_slug
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed") from None
    device = torch.device("cuda", torch.cuda.current_device())
    return Machine(device, architecture(device), gpu_slug(torch.cuda.get_device_name(device)))


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        volumes = [parse_volume(text) for text in args.volume]
        if not args.minutes > 0:
            raise InputError(f"--minutes: expected more than 0, got {args.minutes:g}")
        machine = this_machine()
        problems = _needed(machine, volumes, args.dtype, args.problems)
        earlier = _read(args.json, machine) if args.resume and args.json else []
        return _run(machine, problems, earlier, 60 * args.minutes, args)
    except (InputError, OSError) as error:
        print(f"real_size: error: {error}", file=sys.stderr)
        return 2


def _needed(
    machine: Machine, volumes: Sequence[tuple[int, int, int]], dtypes: Sequence[str], lists: Path | None
) -> list[Problem]:
    """lists: the file of `effseg.tuning.problem_lists`; what it does not have is listed here."""
    from benchmarks import kernel_checks
    from effseg.tuning.problem_lists import Listed, asked, read

    known = read(lists) if lists else {}
    return [
        problem
        for dtype, volume in product(dtypes, volumes)
        for problem in kernel_checks.needed(
            volume,
            dtype,
            machine.architecture,
            machine.gpu,
            asked(
                known,
                Listed(kernel_checks.MODEL, volume, dtype, kernel_checks.CLASSES, machine.architecture),
            ),
        )
    ]


def _run(
    machine: Machine,
    problems: Sequence[Problem],
    earlier: Sequence[Check],
    seconds: float,
    args: argparse.Namespace,
) -> int:
    """earlier: what was checked before, and is not checked again."""
    from benchmarks import kernel_checks

    path: Path | None = args.json
    begun = record.begin(
        volumes=list(args.volume), dtypes=list(args.dtype), tf32=torch.backends.cudnn.allow_tf32
    ).to_dict()
    checks: list[Check] = list(earlier)
    known = {(check.kernel, check.config) for check in earlier}

    def show(check: Check) -> None:
        checks.append(check)
        print(check, flush=True)
        if path is not None:  # after each, for a kernel may take the process with it
            _write(path, begun, checks)

    rest = [problem for problem in problems if kernel_checks.identity(problem) not in known]
    left = kernel_checks.run(rest, machine.device, seconds, show)
    counts = Counter(check.status for check in checks)
    told = [f"{number} {status}" for status, number in counts.items()]
    print(", ".join([*told, f"{left} not run"] if left else told))
    return 0 if counts.keys() <= {"ok"} else 1


def _read(path: Path, machine: Machine) -> list[Check]:
    """What a file has of this machine and these versions; nothing of another's, which is said."""
    from benchmarks.kernel_checks import Check

    if not path.exists():
        return []
    document, now = json.loads(path.read_text(encoding="utf-8")), record.begin()
    if any(
        document[part].get(name) != getattr(now, part)[name]
        for part, name in (("machine", "gpu"), ("versions", "torch"), ("versions", "triton"))
    ):
        print(f"{path} is of another machine, or of other versions: all is checked again")
        return []
    return [Check(**row | {"size": tuple(row["size"])}) for row in document["kernels"]]


def _write(path: Path, begun: dict[str, Any], checks: Sequence[Check]) -> None:
    document = {name: begun[name] for name in ("machine", "versions", "conditions")}
    document["kernels"] = [asdict(check) for check in checks]
    for row in document["kernels"]:
        for name in ("error", "aten_error"):  # JSON knows no infinity
            if row[name] is not None and math.isinf(row[name]):
                row[name] = None
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.real_size", description=HELP)
    parser.add_argument("--volume", nargs="+", default=VOLUMES, metavar="XxYxZ", help="default: %(default)s")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--resume", action="store_true", help="check what that file does not have yet")
    parser.add_argument(
        "--problems", type=Path, metavar="FILE", help="what a step needs, as `benchmarks/problems.json`"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N", help="begin no kernel after so long"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
