"""Pictures of the committed results, drawn from their JSON alone: `python -m benchmarks.plots`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import memory_plots, speed_plots
from benchmarks.accuracy import curves
from effseg.benchmarking import results
from effseg.benchmarking.record import Record
from effseg.common.arguments import Parser
from effseg.errors import InputError
from effseg.figures.canvas import save


def figures(records: Mapping[str, Record]) -> Iterator[tuple[str, Any]]:
    """Names of files, and every figure that the records, by name, suffice for."""
    found = {
        "memory_modes": memory_plots.modes(records.values()),
        "memory_against_volume": memory_plots.against_volume(records.values()),
    }
    for name, record in records.items():
        found[f"throughput_{name}"] = speed_plots.throughput(record)
        found[f"roofline_{name}"] = speed_plots.roofline(record)
    for name, figure in found.items():
        if figure is not None:
            yield f"{name}.png", figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.plots", description="Draws what records hold, as PNG.")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="default: benchmarks/results")
    parser.add_argument("--output", type=Path, help="folder of the pictures (default: that of the results)")
    args = parser.parse_args(argv)
    try:
        drawn = 0
        drawings = figures(results.records(args.results)), curves.figures(args.results / "accuracy")
        for name, figure in chain(*drawings):
            path = (args.output or args.results) / name
            save(figure, path)
            print(path)
            drawn += 1
        if not drawn:
            raise InputError(f"{args.results}: expected records with something to draw, found none")
    except (InputError, OSError) as error:
        print(f"plots: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
