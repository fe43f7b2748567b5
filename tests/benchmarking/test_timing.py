"""Races: fair turns, percentiles, time limits, and contenders that drop out."""

import math

import pytest
import torch

from effseg.benchmarking import timing
from effseg.benchmarking.failure import Failure, attempt
from effseg.benchmarking.timing import Times, race
from effseg.tuning import timer

CPU = torch.device("cpu")


class Track:
    """Turns that note who took them; the stopwatch says what a turn gives, in seconds, and time passes."""

    def __init__(self, **seconds):
        self.now = 0.0
        self.seen = []
        self.turns = {name: lambda name=name: self.taken(name, seconds[name]) for name in seconds}

    def taken(self, name, seconds):
        self.seen.append(name)
        found = seconds.pop(0) if isinstance(seconds, list) else seconds
        if isinstance(found, Exception):
            raise found
        return found

    def watch(self, turn):
        seconds = turn()
        self.now += seconds
        return seconds

    def race(self, **options):
        options = {"device": CPU, "stopwatch": self.watch, "clock": lambda: self.now} | options
        return race(self.turns, **options)


def test_all_take_turns_and_each_round_begins_with_another():
    track = Track(a=1.0, b=2.0, c=3.0)
    found = track.race(rounds=3, warmup=0)
    assert "".join(track.seen) == "abcbcacab"
    assert found == {"a": Times((1.0,) * 3), "b": Times((2.0,) * 3), "c": Times((3.0,) * 3)}


def test_warm_up_does_not_count():
    track = Track(a=[9.0, 8.0, 1.0, 2.0])
    assert track.race(rounds=2, warmup=2) == {"a": Times((1.0, 2.0))}


def test_percentiles():
    times = Times((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert (times.p20, times.p50, times.p80) == (2.0, 3.5, 5.0)
    assert Times((2.0,)).p20 == Times((2.0,)).p80 == 2.0


@pytest.mark.parametrize(("limit", "rounds"), [(0, 3), (25, 3), (45, 5), (math.inf, 9)])
def test_a_time_limit_ends_the_race_but_leaves_three_rounds(limit, rounds):
    track = Track(a=5.0, b=5.0)
    found = track.race(rounds=9, warmup=0, seconds=limit)
    assert {len(times.seconds) for times in found.values()} == {rounds}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 TiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_ends_one_contenders_part(error):
    track = Track(a=[1.0, 1.0, error], b=2.0)
    found = track.race(rounds=4, warmup=1)
    assert found["b"] == Times((2.0,) * 4)
    assert found["a"].status == "out of memory"
    assert found["a"].reason
    assert "\n" not in found["a"].reason
    assert track.seen.count("a") == 3


def test_any_other_error_makes_a_contender_wrong():
    found = Track(a=[ValueError("sizes differ")], b=1.0).race(rounds=1, warmup=0)
    assert found["a"] == Failure("wrong", "ValueError: sizes differ")
    assert isinstance(found["b"], Times)


def test_what_goes_before_a_turn_is_not_timed():
    track, before = Track(a=1.0, b=1.0), []
    track.race(rounds=2, warmup=1, before=lambda name: before.append((name, len(track.seen))))
    assert before == [(name, i) for i, name in enumerate(track.seen)]


def test_nobody_may_take_part():
    assert race({}, device=CPU) == {}


def test_the_hosts_clock_is_the_cpus_stopwatch():
    found = race({"a": lambda: torch.ones(1000).sum()}, device=CPU, rounds=3)
    assert all(0 < seconds < 1 for seconds in found["a"].seconds)


def test_attempts_give_what_functions_give():
    assert attempt(lambda: 3) == 3


@pytest.mark.gpu
def test_events_time_a_gpu(kernel_device):
    x = torch.ones(2**24, device=kernel_device)
    found = race({"add": lambda: x + 1, "thrice": lambda: x + 1 + 1 + 1}, device=kernel_device, rounds=9)
    assert found["add"].p50 < found["thrice"].p50
    assert timing.gpu_seconds(kernel_device, lambda: x + 1, timer.FLUSH_BYTES) > 0
