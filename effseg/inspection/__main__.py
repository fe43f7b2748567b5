"""What the compiler makes of every kernel, without a GPU: `python -m effseg.inspection`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from effseg.common.arguments import Parser
from effseg.common.atomic import atomic_path
from effseg.kernels.config import ARCHITECTURES, DTYPES, LOOPS

COLUMNS = (
    "op",
    "shape",
    "arch",
    "dtype",
    "tiles",
    "registers",
    "spills",
    "shared",
    "mma",
    "loads",
    "issue",
    "issue_all",
    "tensor",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    if args.json and args.json.is_dir():
        parser.error(f"--json: {args.json} is a folder")
    import triton

    from effseg.inspection.cases import cases
    from effseg.inspection.figures import rows

    jobs = [
        (case, architecture, dtype)
        for architecture in args.arch
        for dtype in args.dtype
        for case in cases(args.quick)
        if case.op in args.op and any(shape in case.name for shape in args.shape)
    ]
    if not jobs:
        parser.error(f"--shape: no kernel of these has a shape with {' or '.join(args.shape)!r}")
    # The processes that compile must not import kernels as interpreted ones.
    os.environ.pop("TRITON_INTERPRET", None)
    found = {}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(rows, *job): i for i, job in enumerate(jobs)}
        done = track(
            as_completed(pending), "compiling", len(jobs), console=Console(stderr=True), transient=True
        )
        for future in done:
            found[pending[future]] = future.result()
    table = [row for i in sorted(found) for row in found[i]]
    if args.json:
        with atomic_path(args.json) as path:
            path.write_text(
                json.dumps({"triton": triton.__version__, "rows": table}, indent=1) + "\n", encoding="utf-8"
            )
    Console(width=None if sys.stdout.isatty() else 220).print(_table(table))
    faults = [row for row in table if row["fault"]]
    for row in faults:
        print(row["op"], row["shape"], row["arch"], row["dtype"], row["fault"], sep=": ", file=sys.stderr)
    return 1 if faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m effseg.inspection",
        description="""Compiles every kernel for GPUs that need not be there, with the configurations that
            would be chosen, and says what their machine code costs. Issue clocks per 128 voxels, of the main
            loop and of all code, and tensor clocks are lower bounds of a kernel's time on one multiprocessor.
            Exit code 1 if one does not compile, spills registers, asks for too much shared memory, or
            multiplies 16 channels or more without tensor cores.""",
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="sm_NN")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["bf16"], metavar="DTYPE", help=", ".join(DTYPES)
    )
    parser.add_argument(
        "--op", nargs="+", choices=LOOPS, default=list(LOOPS), metavar="OP", help=", ".join(LOOPS)
    )
    parser.add_argument("--shape", nargs="+", default=[""], help="only shapes with one of these texts")
    parser.add_argument("--quick", action="store_true", help="only layers of 32 channels")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--json", type=Path, help="also write the table there")
    return parser


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="left" if column in COLUMNS[:5] else "right")
    for row in rows:
        table.add_row(
            *(_cell(row.get(column, "-")) for column in COLUMNS), style="red" if row["fault"] else ""
        )
    return table


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}:{count}" for name, count in value.items())
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
