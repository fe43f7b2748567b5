"""`effseg bench`: measure what is compared on this machine, or compare two records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from effseg.benchmarking.record import INTERRUPTED, SUITES, Record, Row, read
from effseg.benchmarking.registry import DTYPES
from effseg.errors import InputError

WIDTH = 130
"""Characters of a line where there is no terminal to ask."""

BAD = ("wrong", "failed")

HELP = """Measure time and memory of training steps and of operators, EffSegNet's beside other networks' and
other ways to compute them, or compare two records that it has written. Nothing else should run meanwhile.
On a GPU each contender has a process of its own, so that one that is lost costs no other. Exit code 1 if a
contender computed something wrong or failed or, of --compare, if something got worse."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE", help=f"of {', '.join(SUITES)}"
    )
    parser.add_argument("--full", action="store_true", help="the long selection of contenders and sizes")
    parser.add_argument(
        "--compiled", action="store_true", help="also what torch.compile makes, which takes minutes each"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:N; default: the GPU if there is one"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: both; on a CPU times of fp32 only"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="begin nothing after so long (default: no limit)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write the record to this file, row by row"
    )
    parser.add_argument(
        "--resume", action="store_true", help="measure only what the record at --output does not have yet"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE.json", "AFTER.json"),
        help="measure nothing, compare",
    )
    parser.add_argument("--force", action="store_true", help="compare records of different machines, too")


def run(args: argparse.Namespace) -> int:
    if args.compare:
        before, after = map(read, args.compare)
        return _compare(before, after, args.force)
    if args.force:
        raise InputError("--force: expected with --compare only")
    return _measure(args)


def _compare(before: Record, after: Record, force: bool) -> int:
    from effseg.benchmarking.compare import compare, conditions

    changes = compare(before, after, force)
    for line in (*conditions(before, after), *changes):
        print(line)
    worse = sum(change.is_worse for change in changes)
    print(f"{worse} figure{'s are' if worse > 1 else ' is'} worse" if worse else "no figure is worse")
    return 1 if worse else 0


def _measure(args: argparse.Namespace) -> int:
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes: expected more than 0, got {args.minutes:g}")
    if args.output is not None and (args.output.is_dir() or args.output.suffix != ".json"):
        raise InputError(f"{args.output}: expected the name of a .json file to write")
    if args.resume and args.output is None:
        raise InputError("--resume: expected with --output only")
    from effseg.benchmarking import suites
    from effseg.common.device import find_device

    device = find_device(args.device)
    with _progress() as show:
        record = suites.run(
            args.suite,
            full=args.full,
            compiled=args.compiled,
            device=device,
            dtypes=args.dtype,
            seconds=None if args.minutes is None else 60 * args.minutes,
            path=args.output,
            resume=args.resume,
            show=show,
        )
    _print(record)
    if any(row.reason == INTERRUPTED for row in record.rows):
        raise KeyboardInterrupt
    return 1 if any(row.status in BAD for row in record.rows) else 0


@contextmanager
def _progress() -> Iterator[Callable[[Row], None]]:
    """Shows the row just made, in one line of a terminal that changes, else in a line each; on stderr."""
    from rich.console import Console

    screen = Console(stderr=True)
    with screen.status("measuring") as status:

        def show(row: Row) -> None:
            line = f"{row.suite}: {_name(row)}: {row.status}"
            if screen.is_terminal:
                status.update(line)
            else:
                print(line, file=sys.stderr, flush=True)

        yield show


def _print(record: Record) -> None:
    from rich.console import Console

    from effseg.benchmarking import tabulation

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for table in tabulation.of_run(record):
        console.print(table.rich())
    for line in tabulation.skipped(record):
        print(line)
    for row in record.rows:
        if row.status in BAD:
            print(f"{row.status}: {row.suite}: {_name(row)}: {row.reason}")


def _name(row: Row) -> str:
    return f"{row.contender}, {row.workload}, {row.dtype}"
