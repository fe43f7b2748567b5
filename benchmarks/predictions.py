"""What the READMEs say of memory that was not measured: `python -m benchmarks.predictions`.

Predicts it, on any machine in a quarter of an hour, and writes benchmarks/results/memory.json and auto.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import auto
from benchmarks.memory_plots import LINES
from effseg.benchmarking import memory, record, results
from effseg.benchmarking.registry import DTYPES, Case, contenders, workloads
from effseg.common.arguments import Parser

CLASSES = 15
FILE = memory.FILE


def cases() -> list[Case]:
    """Every contender of a picture or a table on every volume, the smallest first."""
    volumes = [workload for workload in workloads().values() if workload.classes == CLASSES]
    return [Case(contenders()[name], volume) for volume in volumes for name in LINES]


def rows() -> Iterator[record.Row]:
    for case in cases():
        for dtype in DTYPES:
            yield memory.predicted(case, dtype)


def write(folder: Path) -> None:
    begun, found = record.begin(measured=False), []
    for row in rows():
        found.append(row)
        peak = row.reason if row.bytes_predicted is None else f"{row.bytes_predicted / 1e9:.3f} GB"
        print(f"{row.contender}, {row.workload}, {row.dtype}: {peak}", flush=True)
    record.write(record.finish(begun, found), folder / FILE)
    cells = []
    for budget in auto.BUDGETS:
        for workload in auto.WORKLOADS:
            cells.append(auto.predicted(budget, workload))
            print(f"{budget} GB, {cells[-1].volume}: {cells[-1]}", flush=True)
    auto.write(cells, folder / auto.FILE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmarks.predictions",
        description=f"Predicts the memory of training steps and writes {FILE} and {auto.FILE}.",
    )
    parser.add_argument("--output", type=Path, default=results.FOLDER, help="default: benchmarks/results")
    args = parser.parse_args(argv)
    try:
        write(args.output)
    except OSError as error:
        print(f"predictions: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
