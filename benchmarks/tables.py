"""The READMEs' tables, made from the committed results: `python -m benchmarks.tables`.

A block of the file lies between a line `<!-- benchmark: NAME -->` and the next `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import auto, speed_plots
from benchmarks.accuracy import report
from benchmarks.memory_plots import LINES
from effseg.benchmarking import results, tabulation
from effseg.benchmarking.record import Record
from effseg.benchmarking.tabulation import Table
from effseg.common.arguments import Parser
from effseg.common.atomic import atomic_path
from effseg.errors import InputError

BEGIN = re.compile(r"<!-- benchmark: (\S+) -->")
END = "<!-- end -->"
NOTHING = "Not measured."


# What a block holds, given the folder of results


def memory_block(folder: Path) -> str:
    return tabulation.memory(results.records(folder).values()).markdown()


def auto_block(folder: Path) -> str:
    return auto.table(auto.read(folder / auto.FILE)).markdown()


def cpu_block(folder: Path) -> str:
    return _times(folder, gpu=False, dtype="fp32")


def gpu_block(folder: Path) -> str:
    return _times(folder, gpu=True, dtype="bf16")


def _times(folder: Path, gpu: bool, dtype: str) -> str:
    """Training steps of the usual contenders; records have more."""
    parts = []
    for name, record in _of(folder, gpu).items():
        if speed_plots.steps(record):
            parts.append(_picture(f"throughput_{name}", "throughput against memory"))
        parts += map(_titled, tabulation.throughput(record, TIMED, dtype=dtype, task="train"))
    return "\n\n".join(parts) or NOTHING


def kernels_block(folder: Path) -> str:
    parts = []
    for name, record in _of(folder, gpu=True).items():
        if speed_plots.operators(record):
            parts.append(_picture(f"roofline_{name}", "achieved FLOP/s against arithmetic intensity"))
        parts += map(_titled, tabulation.kernels(record, dtype="bf16"))
    return "\n\n".join(parts) or NOTHING


def accuracy_block(folder: Path) -> str:
    return report.markdown(folder / "accuracy") or NOTHING


def _of(folder: Path, gpu: bool) -> dict[str, Record]:
    """The records of machines with a GPU, or without, by name."""
    found = results.records(folder)
    return {name: record for name, record in found.items() if results.is_on_gpu(record) == gpu}


def _picture(name: str, what: str) -> str:
    """One that `benchmarks.plots` draws, as benchmarks/README.md finds it."""
    return f"![{what}](results/{name}.png)"


def _titled(table: Table) -> str:
    return f"{table.title}:\n\n{table.markdown()}"


TIMED = (
    *LINES, "nnunet/raw/auto", "nnunet/block/auto",
    *(f"effseg-base/{memory}/{how}" for how in ("aten", "triton") for memory in ("raw", "stream")),
)  # fmt: skip
"""Contenders whose time benchmarks/README.md tells."""
BLOCKS: dict[str, Callable[[Path], str]] = {
    "memory": memory_block,
    "auto": auto_block,
    "cpu": cpu_block,
    "gpu": gpu_block,
    "kernels": kernels_block,
    "accuracy": accuracy_block,
}

ROOT = results.FOLDER.parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "effseg" / "planning" / "README.md")
"""Where the blocks stand, each once."""


# The files


def regenerated(text: str, folder: Path = results.FOLDER) -> tuple[str, list[str]]:
    """The text with its blocks made anew, and the names of those that differ.

    Raises InputError for a block that is not known or has no end, and for results that are not there.
    """
    made, differing = [], []
    lines = iter(text.splitlines())
    for line in lines:
        made.append(line)
        begin = BEGIN.fullmatch(line)
        if begin:
            name = begin[1]
            if name not in BLOCKS:
                raise InputError(f"{name}: expected a block of {', '.join(BLOCKS)}")
            block = BLOCKS[name](folder)
            if _block(name, lines) != block:
                differing.append(name)
            made += [block, END]
    return "\n".join(made) + "\n", differing


def _block(name: str, lines: Iterator[str]) -> str:
    """The lines up to the next END, which is read, too."""
    found: list[str] = []
    for line in lines:
        if line == END:
            return "\n".join(found)
        found.append(line)
    raise InputError(f"{name}: expected a line {END} after the block, found none")


# The command


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmarks.tables",
        description=f"""Makes the tables of Markdown files anew ({", ".join(BLOCKS)}), from the JSON of
            benchmarks/results. Exit code 1 with --check if one differs.""",
    )
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        default=PAGES,
        metavar="README.md",
        help="default: every page with a table",
    )
    parser.add_argument("--check", action="store_true", help="write nothing, name the blocks that differ")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="default: benchmarks/results")
    args = parser.parse_args(argv)
    differing = []
    try:
        for file in args.files:
            text, names = regenerated(file.read_text(encoding="utf-8"), args.results)
            differing += names
            if not args.check:
                with atomic_path(file) as temporary:
                    temporary.write_text(text, encoding="utf-8")
    except (InputError, OSError, UnicodeDecodeError) as error:
        print(f"tables: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name in differing:
        print(f"{'differs' if args.check else 'made anew'}: {name}")
    return 1 if args.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
