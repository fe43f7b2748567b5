"""Lists of what a network's step asks of kernels, in a file: making one takes half a minute of a CPU, for
which a GPU should not wait.

`python -m benchmarks.problems` writes benchmarks/problems.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from effseg.common.atomic import atomic_path
from effseg.errors import InputError
from effseg.kernels.config import Problem, Triple

SCHEMA = 1
TRIPLES = ("size", "kernel", "stride")


class Listed(NamedTuple):
    """What a list is of, see `effseg.tuning.autotune.problems`."""

    model: str
    volume: Triple
    dtype: str
    classes: int
    architecture: str


Lists = Mapping[Listed, Sequence[Problem]]


def asked(lists: Lists, wanted: Listed) -> list[Problem] | None:
    """What is wanted, if some list is of that network, volume and type. Of classes only the head's operators
    depend, and nothing that is asked depends on the architecture."""
    for listed, problems in lists.items():
        if listed._replace(classes=wanted.classes, architecture=wanted.architecture) == wanted:
            return [_rewritten(problem, wanted) for problem in problems]
    return None


def _rewritten(problem: Problem, wanted: Listed) -> Problem:
    outputs = wanted.classes if problem.op.startswith("head") else problem.out_channels
    return replace(problem, architecture=wanted.architecture, out_channels=outputs)


def write(lists: Lists, path: Path) -> None:
    rows = [
        listed._asdict() | {"problems": [_row(problem) for problem in problems]}
        for listed, problems in lists.items()
    ]
    with atomic_path(path) as temporary:
        temporary.write_text(_text(rows), encoding="utf-8")


def read(path: Path) -> dict[Listed, list[Problem]]:
    """Raises InputError for a file that `write` has not made."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise InputError(f"{path}: expected schema {SCHEMA}, got {data['schema']!r}")
        return dict(_list(row) for row in data["lists"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected lists of problems, got {error!r}") from None


def _row(problem: Problem) -> list[Any]:
    """Without what the list's head says, and without a GPU's name."""
    return [
        problem.op, problem.in_channels, problem.out_channels,
        *("x".join(map(str, getattr(problem, name))) for name in TRIPLES), problem.prologue,
    ]  # fmt: skip


def _list(row: dict[str, Any]) -> tuple[Listed, list[Problem]]:
    problems = row.pop("problems")
    listed = Listed(**row | {"volume": tuple(row["volume"])})
    return listed, [_problem(listed, *fields) for fields in problems]


def _problem(listed: Listed, op: str, *fields: Any) -> Problem:
    in_channels, out_channels, *triples, prologue = fields
    size, kernel, stride = map(_triple, triples)
    head = op, listed.architecture, listed.dtype, in_channels, out_channels
    return Problem(*head, size, kernel, stride, prologue)


def _triple(text: str) -> Triple:
    d, h, w = map(int, text.split("x"))
    return d, h, w


def _text(rows: Sequence[dict[str, Any]]) -> str:
    """JSON with a line for each problem."""
    lists = []
    for row in rows:
        head = ", ".join(f"{json.dumps(name)}: {json.dumps(row[name])}" for name in Listed._fields)
        problems = ",\n  ".join(json.dumps(problem) for problem in row["problems"])
        lists.append(f' {{{head}, "problems": [\n  {problems}\n ]}}')
    return f'{{"schema": {SCHEMA}, "lists": [\n' + ",\n".join(lists) + "\n]}\n"
