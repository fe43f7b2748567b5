"""A record that is on disk after every row: what ends a run, ends it without what had been measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from effseg.benchmarking.record import Record, Row, finish, read, write
from effseg.errors import InputError

Key = tuple[str, str, str, str, str]
SAME_VERSIONS = ("python", "torch", "triton", "cudnn", "effseg")
"""What rows of one record have in common; of commits it lists several."""
BEGUN = "begun"
"""Condition of a record that is being written: how often each row that is not there yet was begun."""


def key(row: Row) -> Key:
    return row.suite, row.contender, row.workload, row.dtype, row.task


class Journal:
    """record: as it begins, see `record.begin`; path: of the file that holds all of it after every row, whole
    at any moment; None for a record that is only kept in memory."""

    def __init__(self, record: Record, path: Path | None = None) -> None:
        self._record, self._path = record, path
        self._rows = {key(row): row for row in record.rows}
        self._begun: dict[str, int] = dict(record.conditions.get(BEGUN, {}))

    def found(self, row: Row) -> Row | None:
        """The one of the same key."""
        return self._rows.get(key(row))

    def settled(self, row: Row) -> bool:
        """Whether its like was measured, or failed: what was skipped may yet be."""
        known = self.found(row)
        return known is not None and known.status != "skipped"

    def begin(self, rows: Sequence[Row]) -> int:
        """Note that these are about to be measured. How often they were begun before, by runs that ended
        meanwhile without a word."""
        names = ["; ".join(key(row)) for row in rows]
        before = max((self._begun.get(name, 0) for name in names), default=0)
        self._begun |= {name: before + 1 for name in names}
        self._write()
        return before

    def end(self, rows: Sequence[Row]) -> None:
        """Of what was begun and has ended as it should, with rows or without."""
        for row in rows:
            self._begun.pop("; ".join(key(row)), None)

    def add(self, row: Row) -> None:
        """In place of one of the same key, if there is one."""
        self._rows[key(row)] = row
        self.end([row])
        self._write()

    def close(self, rest: Iterable[Row] = ()) -> Record:
        """The record, with rows for what is not in it."""
        for row in rest:
            self._rows.setdefault(key(row), row)
        self._record = finish(self._record, [])
        self._write()
        return self._now()

    def _now(self) -> Record:
        conditions = {name: value for name, value in self._record.conditions.items() if name != BEGUN}
        if self._begun:
            conditions[BEGUN] = self._begun
        return replace(self._record, conditions=conditions, rows=tuple(self._rows.values()))

    def _write(self) -> None:
        if self._path is not None:
            write(self._now(), self._path)


def continued(begun: Record, path: Path) -> Record:
    """`begun` with what a file has measured already; of a file that is not there nothing.

    Raises InputError for another machine's, or one of other versions. Commits may differ: the conditions
    name them all.
    """
    if not path.exists():
        return begun
    earlier = read(path)
    ran_on, runs_on = _origin(earlier), _origin(begun)
    for name, value in runs_on.items():
        if ran_on[name] != value:
            raise InputError(f"{path}: expected a record of {name} {value}, got {ran_on[name]}")
    commits = [*earlier.conditions.get("commits", [earlier.versions["commit"]]), begun.versions["commit"]]
    conditions = earlier.conditions | begun.conditions | {"commits": list(dict.fromkeys(commits))}
    rows = tuple(row for row in earlier.rows if row.status != "skipped")
    return replace(begun, conditions=conditions, rows=rows)


def _origin(record: Record) -> dict[str, Any]:
    machine = {name: record.machine[name] for name in ("cpu", "gpu")}
    return machine | {name: record.versions[name] for name in SAME_VERSIONS}
