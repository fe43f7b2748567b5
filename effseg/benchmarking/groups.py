"""What is measured together, one group after the other: each in its share of the time, and each row noted as
soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from effseg.benchmarking.journal import Journal, Key, key
from effseg.benchmarking.record import INTERRUPTED, Row
from effseg.common.isolation import isolated

LATE = "the time limit was reached"
MOST_BEGINNINGS = 2
"""Of a group that ends the whole run, and not only its own process."""
SILENCE = 300.0
"""Seconds that a row may take in a process of its own: kernels are compiled before they are timed."""

Show = Callable[[Row], object]
Run = Callable[[Sequence[Row], float, Show], object]


@dataclass(frozen=True)
class Group:
    """rows: without figures; run: given those that are wanted, seconds, and what to show rows with; isolated:
    in a process of its own, for which `run` is pickled; silence: seconds after which that one is given up."""

    rows: tuple[Row, ...]
    run: Run
    isolated: bool = False
    silence: float = SILENCE


def measure(suites: Sequence[Sequence[Group]], seconds: float, journal: Journal, show: Show) -> None:
    """Suites share the time that is left when each begins, and so do the groups of a suite. Rows that the
    journal has are not measured again. KeyboardInterrupt ends the measuring: what is left is skipped."""
    deadline = time.monotonic() + seconds
    notes = _Notes(journal, show)
    interrupted = False
    for i, groups in enumerate(suites):
        begun = time.monotonic()
        until = begun + (deadline - begun) / (len(suites) - i)
        todo = [group for group in groups if notes.rest(group)]
        for j, group in enumerate(todo):
            left = until - time.monotonic()
            if left > 0 and not interrupted:
                try:
                    _measured(group, left / (len(todo) - j), left, notes)
                except KeyboardInterrupt:
                    interrupted = True
                finally:
                    journal.end(group.rows)
            notes.fail(group, "skipped", INTERRUPTED if interrupted else LATE)


def _measured(group: Group, share: float, left: float, notes: _Notes) -> None:
    """share: of the time, for the group to use; left: all that there is."""
    wanted = notes.rest(group)
    if notes.journal.begin(wanted) >= MOST_BEGINNINGS:
        notes.fail(group, "failed", f"{MOST_BEGINNINGS} runs ended while it was measured")
    elif group.isolated:
        run = partial(group.run, wanted, share)
        if loss := isolated(run, notes.add, silence=group.silence, seconds=left):
            notes.fail(group, "skipped" if loss.late else "failed", loss.reason)
    else:
        group.run(wanted, share, notes.add)


class _Notes:
    """Rows as they come: into the journal, then shown."""

    def __init__(self, journal: Journal, show: Show) -> None:
        self.journal, self._show = journal, show
        self._told: set[Key] = set()

    def add(self, row: Row) -> None:
        self._told.add(key(row))
        self.journal.add(row)
        self._show(row)

    def rest(self, group: Group) -> list[Row]:
        """Of which nothing is known yet: neither from an earlier run nor, be it skipped, from this one."""
        return [row for row in group.rows if key(row) not in self._told and not self.journal.settled(row)]

    def fail(self, group: Group, status: str, reason: str) -> None:
        for row in self.rest(group):
            self.add(replace(row, status=status, reason=reason))
