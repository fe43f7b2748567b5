"""What changed between two records of one machine, and whether any of it is worse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from effseg.benchmarking.record import STATUSES, Record, Row
from effseg.errors import InputError

SLOWER = 0.05
"""Relative, of medians; less is the same, and so is more while the spreads of both overlap."""
LARGER = 0.005
"""Relative, of what every run has alike: bytes, parameters, multiply-accumulates."""
COUNTED = (
    "bytes_allocated", "bytes_reserved", "bytes_outside_convolutions", "bytes_predicted", "bytes_moved",
    "parameters", "macs",
)  # fmt: skip
COMPARED = ("seconds_p50", *COUNTED)
SAME = ("gpu", "cpu", "threads")
"""Of the machine: what must agree, for times to be comparable."""

Key = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """verdict: worse, better, or new (told, no judgement); row: suite, contender, workload, dtype and task;
    what: the figure, "status" or "row"; before and after: None where there was or is none."""

    verdict: str
    row: Key
    what: str
    before: float | str | None
    after: float | str | None

    @property
    def is_worse(self) -> bool:
        return self.verdict == "worse"

    def __str__(self) -> str:
        suite, contender, *rest = self.row
        values = f"{_text(self.before)} -> {_text(self.after)}"
        if isinstance(self.before, int | float) and isinstance(self.after, int | float) and self.before:
            values += f" ({self.after / self.before - 1:+.1%})"
        return f"{self.verdict}: {suite}: {contender}: {', '.join(rest)}: {self.what}: {values}"


def compare(before: Record, after: Record, force: bool = False) -> list[Change]:
    """What differs by more than the spread of times, or the tolerance of counts, the worse first.

    Raises InputError for records of different machines, unless `force`, and for one that has a row twice.
    """
    differing = [name for name in SAME if before.machine[name] != after.machine[name]]
    if differing and not force:
        values = "; ".join(f"{name} {before.machine[name]} and {after.machine[name]}" for name in differing)
        raise InputError(f"compare: expected records of one machine, got {values} (--force compares anyway)")
    old, new = _by_key(before), _by_key(after)
    changes = [change for key in old.keys() & new.keys() for change in _changes(key, old[key], new[key])]
    changes += [Change("worse", key, "row", row.status, None) for key, row in _only_in(old, new).items()]
    changes += [Change("new", key, "row", None, row.status) for key, row in _only_in(new, old).items()]
    verdicts = ("worse", "better", "new")
    return sorted(changes, key=lambda change: (verdicts.index(change.verdict), change.row, change.what))


def conditions(before: Record, after: Record) -> list[str]:
    """Versions and conditions that differ, a line for each: they may explain a change."""
    pairs = [(before.versions, after.versions), (before.conditions, after.conditions)]
    return [
        f"{name}: {_text(old.get(name))} -> {_text(new.get(name))}"
        for old, new in pairs
        for name in [*old, *(name for name in new if name not in old)]
        if old.get(name) != new.get(name)
    ]


def _by_key(record: Record) -> dict[Key, Row]:
    found: dict[Key, Row] = {}
    for row in record.rows:
        key = (row.suite, row.contender, row.workload, row.dtype, row.task)
        if key in found:
            raise InputError(f"compare: expected each row once, got two of {', '.join(key)}")
        found[key] = row
    return found


def _only_in(rows: dict[Key, Row], others: dict[Key, Row]) -> dict[Key, Row]:
    """Those that were run, or have a figure."""
    return {
        key: row
        for key, row in rows.items()
        if key not in others
        and (row.status != "skipped" or any(getattr(row, name) is not None for name in COMPARED))
    }


def _changes(key: Key, before: Row, after: Row) -> Iterator[Change]:
    if before.status != after.status:
        rank = STATUSES.index
        verdict = "worse" if rank(after.status) > rank(before.status) else "better"
        yield Change(verdict, key, "status", _status(before), _status(after))
    for name in COMPARED:
        old, new = getattr(before, name), getattr(after, name)
        if old is None and new is not None:
            yield Change("new", key, name, None, new)
        elif old is not None and new is None and before.status == after.status:  # else that says enough
            yield Change("worse", key, name, old, None)
        elif old is not None and new is not None:
            found = _slower(before, after) if name == "seconds_p50" else _larger(old, new, LARGER)
            if found:
                yield Change(found, key, name, old, new)


def _slower(before: Row, after: Row) -> str | None:
    """The verdict on times; None while the bands from the 20th to the 80th percentile overlap."""
    (low, middle, high), (new_low, new_middle, new_high) = _band(before), _band(after)
    return None if new_low <= high and low <= new_high else _larger(middle, new_middle, SLOWER)


def _band(row: Row) -> tuple[float, float, float]:
    """Percentiles 20, 50 and 80 of a row that has a median."""
    assert row.seconds_p50 is not None
    low = row.seconds_p50 if row.seconds_p20 is None else row.seconds_p20
    high = row.seconds_p50 if row.seconds_p80 is None else row.seconds_p80
    return low, row.seconds_p50, high


def _larger(before: float, after: float, tolerance: float) -> str | None:
    if abs(after - before) <= tolerance * before:
        return None
    return "worse" if after > before else "better"


def _status(row: Row) -> str:
    return f"{row.status} ({row.reason})" if row.reason else row.status


def _text(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
