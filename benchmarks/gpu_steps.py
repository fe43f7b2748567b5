"""`python -m benchmarks.gpu_steps PART`: whether a GPU computes the right thing, then the figures that matter
most, the most valuable first. Each row has a process of its own and is written when it is there; what the
file has already is not measured again. `benchmarks/gpu.sh` calls it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import first_checks
from effseg.benchmarking import suites
from effseg.benchmarking.groups import Group, measure
from effseg.benchmarking.journal import Journal, continued
from effseg.benchmarking.record import INTERRUPTED, Row, begin
from effseg.benchmarking.registry import Case, contenders, workloads
from effseg.benchmarking.timing import ROUNDS
from effseg.common.arguments import Parser
from effseg.common.device import find_device
from effseg.errors import InputError
from effseg.memory.units import format_bytes

DTYPE = "bf16"
VOLUMES = ("512x512x256, 15 classes", "512x512x512, 15 classes")
OURS = tuple(f"effseg-base/{memory}/{how}" for how in ("aten", "triton") for memory in ("raw", "stream"))
OTHERS = ("nnunet/eager", "stock-effseg-base/eager")
PARTS = ("first", "steps", "again")
SECONDS = 20.0
"""Of rounds; warming up and the first three are not cut short."""
SILENCE = {"aten": 120.0, "eager": 120.0, "triton": 400.0}
"""Seconds that a row may take: Triton compiles over a hundred kernels, once on a machine."""
BAD = ("wrong", "failed")


def groups(part: str, device: torch.device) -> Iterator[Group]:
    """What the part measures, in order. first: `first_checks`. steps: training steps of ours, then of others.
    again: ours once more, after tuning."""
    if part == "first":
        yield Group((first_checks.DOCTOR,), first_checks.diagnosis, isolated=True, silence=120.0)
        for memory in ("raw", "stream"):
            run = partial(first_checks.gradients, memory, DTYPE, device)
            row = first_checks.gradients_row(memory, DTYPE)
            yield Group((row,), run, isolated=True, silence=SILENCE["triton"])
        return
    for names in (OURS, OTHERS) if part == "steps" else (OURS,):
        for volume in VOLUMES:
            for name in names:
                case = Case(contenders()[name], workloads()[volume])
                group = suites.race([case], DTYPE, device, ["train"], most=SECONDS)
                yield replace(group, silence=SILENCE[case.contender.implementation])


def run(part: str, device: torch.device, path: Path, seconds: float) -> int:
    """The exit code: 1 where a row of the part is wrong or failed."""
    begun = begin(
        device=str(device), rounds=ROUNDS, tuned=part == "again", tf32=torch.backends.cudnn.allow_tf32
    )
    journal = Journal(continued(begun, path), path)
    todo = list(groups(part, device))
    measure([todo], seconds, journal, lambda row: print(told(row), flush=True))
    journal.close()
    rows = [row for group in todo for row in map(journal.found, group.rows) if row is not None]
    if any(row.reason == INTERRUPTED for row in rows):
        raise KeyboardInterrupt
    left = [row for row in rows if row.status == "skipped"]
    print(f"{part}: {len(rows) - len(left)} of {len(rows)} rows are in {path}")
    for reason in dict.fromkeys(row.reason for row in left):
        print(f"skipped: {sum(row.reason == reason for row in left)} rows: {reason}")
    return 1 if any(row.status in BAD for row in rows) else 0


def told(row: Row) -> str:
    """As in "effseg-base/raw/aten, 512x512x256, 15 classes, bf16, train: ok: 0.5 s, 11.7 GiB allocated"."""
    figures = []
    if row.seconds_p50 is not None:
        figures.append(f"{row.seconds_p50:.4g} s ({row.seconds_p20:.4g} to {row.seconds_p80:.4g})")
    for what in ("allocated", "reserved", "predicted"):
        if (size := getattr(row, f"bytes_{what}")) is not None:
            figures.append(f"{format_bytes(size)} {what}")
    name = f"{row.contender}, {row.workload}, {row.dtype}, {row.task}"
    return ": ".join(filter(None, (name, row.status, ", ".join(figures), row.reason)))


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if not args.minutes > 0:
            raise InputError(f"--minutes: expected more than 0, got {args.minutes:g}")
        return run(args.part, find_device("cuda"), args.output, 60 * args.minutes)
    except (InputError, OSError) as error:
        print(f"gpu_steps: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.gpu_steps", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="the record")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N", help="begin no row after so long"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
