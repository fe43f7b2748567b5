"""Records that grow: what is on disk, and what a later run makes of it."""

from dataclasses import replace

import pytest

from effseg.benchmarking import groups, record
from effseg.benchmarking.groups import Group, measure
from effseg.benchmarking.journal import Journal, continued
from effseg.benchmarking.record import Row
from effseg.common.isolation import Loss
from effseg.errors import InputError

A, B = (Row("memory", name, "64x64x64, 15 classes", "bf16") for name in "ab")
FAILED = replace(A, status="failed", reason="SIGABRT")
SKIPPED = replace(B, status="skipped", reason="late")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "record.json"


def test_every_row_is_on_disk_and_nothing_else(path):
    journal = Journal(record.begin(), path)
    for row, rows in ((A, (A,)), (SKIPPED, (A, SKIPPED)), (B, (A, B))):
        journal.add(row)
        assert record.read(path).rows == rows
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_what_was_skipped_is_measured_later_and_what_failed_is_not(path):
    journal = Journal(record.begin(), path)
    journal.add(FAILED)
    journal.add(SKIPPED)
    later = Journal(continued(record.begin(), path), path)
    assert later.settled(A)
    assert not later.settled(B)
    assert later.close([A, SKIPPED]).rows == (FAILED, SKIPPED)
    assert record.read(path).rows == (FAILED, SKIPPED)


def test_a_record_of_two_commits_names_both(path):
    begun = record.begin(tuned=True)
    record.write(replace(begun, versions=begun.versions | {"commit": "a" * 40}, rows=(A,)), path)
    now = replace(record.begin(rounds=7), versions=begun.versions | {"commit": "b" * 40})
    found = continued(now, path)
    assert found.conditions == {"tuned": True, "rounds": 7, "commits": ["a" * 40, "b" * 40]}
    assert found.rows == (A,)


@pytest.mark.parametrize(
    ("part", "changes", "line"),
    [
        ("machine", {"gpu": "NVIDIA H200"}, "expected a record of gpu None, got NVIDIA H200"),
        ("versions", {"torch": "1.0"}, "expected a record of torch .*, got 1.0"),
    ],
)
def test_another_machines_record_is_refused(path, part, changes, line):
    begun = record.begin()
    record.write(replace(begun, **{part: getattr(begun, part) | changes}), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=line):
        continued(record.begin(), path)
    assert path.read_bytes() == before


def test_what_ended_two_runs_is_not_begun_a_third_time(path):
    class Killed(BaseException):
        """Of a run that never gets to say anything."""

    def run(wanted, seconds, show):
        raise Killed

    def again(group):
        journal = Journal(continued(record.begin(), path), path)
        begun.append(journal.begin(group.rows))  # as `measure` does, and is killed

    begun = []
    for _ in range(2):
        again(Group((A,), run))
    assert begun == [0, 1]
    journal = Journal(continued(record.begin(), path), path)
    good = Group((B,), lambda wanted, seconds, show: show(B))
    measure([[Group((A,), run), good]], 60, journal, lambda row: None)
    rows = record.read(path).rows
    assert rows == (replace(A, status="failed", reason="2 runs ended while it was measured"), B)
    assert "begun" not in journal.close().conditions


def test_what_a_process_did_not_tell_has_failed_or_was_late(monkeypatch):
    losses = iter([Loss("SIGABRT"), Loss("not done in the time left", late=True)])

    def isolated(run, tell, *, silence, seconds):
        tell(run.args[0][0])
        return next(losses)

    monkeypatch.setattr(groups, "isolated", isolated)
    todo = [Group(tuple(replace(r, dtype=d) for r in (A, B)), print, isolated=True) for d in ("bf16", "fp32")]
    journal = Journal(record.begin())
    measure([todo], 60, journal, lambda row: None)
    assert [(row.status, row.reason) for row in journal.close().rows] == [
        ("ok", ""), ("failed", "SIGABRT"), ("ok", ""), ("skipped", "not done in the time left"),
    ]  # fmt: skip


def test_a_row_that_was_skipped_for_a_reason_keeps_it():
    told = replace(A, status="skipped", reason="monai is not installed")
    journal = Journal(record.begin())
    measure([[Group((A,), lambda wanted, seconds, show: show(told))]], 60, journal, lambda row: None)
    assert journal.close().rows == (told,)
