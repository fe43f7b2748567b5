"""Comparing records: what is worse, what is noise, what cannot be compared."""

from dataclasses import replace

import pytest
from benchmark_records import predicted, record, timed

from effseg.benchmarking.compare import Change, compare, conditions
from effseg.benchmarking.record import Row
from effseg.errors import InputError

KEY = ("throughput", "unet3d/eager", "96x96x96, 15 classes", "fp32", "train")
BEFORE = timed("unet3d/eager", 1.0, bytes_allocated=1000, parameters=100, macs=50)


def verdicts(before, after):
    """(verdict, what) of every change between two rows."""
    return [(change.verdict, change.what) for change in compare(record(before), record(after))]


def test_the_same_is_no_change():
    assert compare(record(BEFORE), record(BEFORE)) == []


@pytest.mark.parametrize(
    ("median", "spread", "verdict"),
    [
        (1.04, 0.001, []),  # apart, but by less than 5 %
        (1.5, 0.4, []),  # by more, but the bands overlap
        (1.1, 0.01, [("worse", "seconds_p50")]),
        (0.9, 0.01, [("better", "seconds_p50")]),
        (0.96, 0.001, []),
    ],
)
def test_times_differ_beyond_their_spread_or_not_at_all(median, spread, verdict):
    after = timed("unet3d/eager", median, spread, bytes_allocated=1000, parameters=100, macs=50)
    assert verdicts(BEFORE, after) == verdict


def test_a_time_without_percentiles_is_its_own_band():
    bare = replace(BEFORE, seconds_p20=None, seconds_p80=None)
    assert verdicts(bare, replace(bare, seconds_p50=1.06)) == [("worse", "seconds_p50")]


@pytest.mark.parametrize("name", ["bytes_allocated", "parameters", "macs"])
def test_counts_may_differ_by_half_a_percent(name):
    before = replace(BEFORE, **{name: 1000})
    assert verdicts(before, replace(before, **{name: 1005})) == []
    assert verdicts(before, replace(before, **{name: 1006})) == [("worse", name)]
    assert verdicts(before, replace(before, **{name: 994})) == [("better", name)]


def test_a_figure_that_is_gone_is_worse_and_one_that_came_is_told():
    bare = replace(BEFORE, macs=None)
    assert verdicts(BEFORE, bare) == [("worse", "macs")]
    assert verdicts(bare, BEFORE) == [("new", "macs")]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ("ok", "wrong", "worse"),
        ("ok", "skipped", "worse"),
        ("skipped", "out of memory", "worse"),
        ("out of memory", "ok", "better"),
    ],
)
def test_a_status_gets_better_or_worse(before, after, verdict):
    rows = [predicted("unet3d/eager", 2000, status=status, reason="why") for status in (before, after)]
    assert verdicts(*rows) == [(verdict, "status")]


def test_figures_of_a_row_that_no_longer_runs_are_not_told_one_by_one():
    failed = replace(BEFORE, status="wrong", reason="loss 1, not 2", seconds_p50=None, bytes_allocated=None)
    assert verdicts(BEFORE, failed) == [("worse", "status")]


def test_rows_come_and_go_the_worse_first():
    kept, gone, new = (timed(f"{name}/eager", 1.0) for name in ("segresnet", "unet3d", "nnunet"))
    slower = timed("segresnet/eager", 2.0)
    changes = compare(record(kept, gone), record(new, slower))
    assert [(change.verdict, change.row[1], change.what) for change in changes] == [
        ("worse", "segresnet/eager", "seconds_p50"),
        ("worse", "unet3d/eager", "row"),
        ("new", "nnunet/eager", "row"),
    ]
    assert [change.is_worse for change in changes] == [True, True, False]


def test_a_row_that_never_ran_is_not_missed():
    listed = Row("memory", "unet3d/budget", "64x64x64", "bf16", status="skipped", reason="only with --full")
    assert compare(record(BEFORE, listed), record(BEFORE)) == []
    assert compare(record(BEFORE), record(BEFORE, listed)) == []
    known = replace(listed, bytes_predicted=1000)
    assert [change.what for change in compare(record(known), record())] == ["row"]


def test_a_change_is_one_line():
    assert str(Change("worse", KEY, "seconds_p50", 1.0, 1.1)) == (
        "worse: throughput: unet3d/eager: 96x96x96, 15 classes, fp32, train: seconds_p50: 1 -> 1.1 (+10.0%)"
    )
    assert str(Change("new", KEY, "row", None, "ok")).endswith("row: none -> ok")


@pytest.mark.parametrize("other", [{"gpu": "NVIDIA H200"}, {"threads": 4}])
def test_other_machines_are_refused_unless_forced(other):
    with pytest.raises(InputError, match="expected records of one machine"):
        compare(record(BEFORE), record(BEFORE, **other))
    assert compare(record(BEFORE), record(BEFORE, **other), force=True) == []


def test_a_row_twice_is_refused():
    with pytest.raises(InputError, match="expected each row once, got two of throughput, unet3d/eager"):
        compare(record(BEFORE, BEFORE), record(BEFORE))


def test_conditions_that_differ_are_told():
    before, after = record(rounds=5), record(rounds=7, minutes=3)
    after.versions["torch"] = "2.14.0"
    assert conditions(before, before) == []
    assert conditions(before, after) == ["torch: 2.13.0 -> 2.14.0", "rounds: 5 -> 7", "minutes: none -> 3"]
