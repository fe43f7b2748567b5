"""Options that the suites share; their rows, printed at the end, and written as one record with --record."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from effseg.benchmarking import record, suites
from effseg.benchmarking.record import Record, Row

STARTED = pytest.StashKey[Record]()
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the long selection of contenders and workloads")
    parser.addoption("--compiled", action="store_true", help="also what torch.compile makes")
    parser.addoption("--record", type=Path, metavar="FILE", help="write all rows to a JSON file")


def pytest_xdist_auto_num_workers() -> int:
    """Times are of one process with the machine to itself."""
    return 0


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = record.begin(
        full=config.getoption("--full"), tf32=torch.backends.cudnn.allow_tf32, tool="pytest benchmarks"
    )
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--compiled"))


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., list[Row]]:
    """measured(function, *arguments, **options): its rows. The benchmark's time is that of all of it, its
    rows are in the report's extra_info."""

    def run(function: Callable[..., Sequence[Row]], *arguments: Any, **options: Any) -> list[Row]:
        rows = list(benchmark.pedantic(function, arguments, options))
        benchmark.extra_info["rows"] = [asdict(row) for row in rows]
        request.config.stash[ROWS] += rows
        return rows

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    for suite in dict.fromkeys(row.suite for row in rows):
        known = {row.contender for row in rows if row.suite == suite}
        options = config.getoption("--full"), config.getoption("--compiled")
        left_out = suites.unselected(suite, options[0], compiled=options[1])
        rows += [row for row in left_out if row.contender not in known]
    # Of what several tests have run the first row holds most: its memory is measured, too.
    unique: dict[tuple[str, ...], Row] = {}
    for row in rows:
        unique.setdefault((row.suite, row.contender, row.workload, row.dtype, row.task), row)
    found = record.finish(config.stash[STARTED], list(unique.values()))
    terminalreporter.section("rows")
    terminalreporter.write_line(_text(found))
    if path := config.getoption("--record"):
        record.write(found, path)
        terminalreporter.write_line(f"written: {path}")


def _text(found: Record) -> str:
    """Tables of what was run, a line for each reason why others were not."""
    from rich.console import Console

    from effseg.benchmarking import tabulation

    page = io.StringIO()
    console = Console(file=page, width=160)
    for table in tabulation.of_run(found):
        console.print(table.rich())
    return "\n".join([page.getvalue(), *tabulation.skipped(found)])
