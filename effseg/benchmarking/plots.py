"""Pictures of the committed results, drawn from their JSON alone: `python -m effseg.benchmarking.plots`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from effseg.benchmarking import memory_plots, results, speed_plots
from effseg.benchmarking.record import Record
from effseg.errors import InputError
from effseg.figures.canvas import save


def figures(records: Sequence[Record]) -> Iterator[tuple[str, Any]]:
    """Names of files, and every figure that the records suffice for."""
    for name, figure in (
        ("memory_modes.png", memory_plots.modes(records)),
        ("memory_against_volume.png", memory_plots.against_volume(records)),
        *((f"throughput_{slug(record)}.png", speed_plots.throughput(record)) for record in records),
        *((f"roofline_{slug(record)}.png", speed_plots.roofline(record)) for record in records),
    ):
        if figure is not None:
            yield name, figure


def slug(record: Record) -> str:
    """The GPU's name in a file's, or "cpu"."""
    return re.sub(r"[^a-z0-9]+", "-", (record.machine["gpu"] or "cpu").lower()).strip("-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"plots: error: {message} (see --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _Parser(
        prog="python -m effseg.benchmarking.plots", description="Draws what records hold, as PNG."
    )
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="default: benchmarks/results")
    parser.add_argument("--output", type=Path, help="folder of the pictures (default: that of the results)")
    args = parser.parse_args(argv)
    try:
        drawn = 0
        for name, figure in figures(results.records(args.results)):
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
