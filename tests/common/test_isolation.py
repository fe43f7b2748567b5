"""Work in processes of their own: what they tell, and how they end."""

import os
import subprocess
import sys
from functools import partial

import isolated_work
import pytest

from effseg.common import isolation
from effseg.common.isolation import Loss, isolated


def told(work, **limits):
    """What comes of it: its words, and why there are no more."""
    words = []
    return words, isolated(work, words.append, **limits)


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_that_is_told_arrives():
    assert told(partial(isolated_work.tells, range(3))) == ([0, 1, 2], None)
    (process,), _ = told(isolated_work.tells_its_process)
    assert process != os.getpid()


@pytest.mark.parametrize(
    ("work", "words", "reason"),
    [
        (isolated_work.raises, ["first"], "ValueError: two lines"),
        (isolated_work.aborts, ["first"], "its process ended: SIGABRT: an illegal memory access"),
        (isolated_work.exits, [], "its process ended: exit code 3"),
    ],
)
def test_what_ends_a_process_ends_no_other(work, words, reason):
    assert told(work) == (words, Loss(reason))
    assert told(partial(isolated_work.tells, "b")) == (["b"], None)


def test_what_it_writes_to_stderr_is_seen(capsys):
    told(isolated_work.aborts)
    assert "what():  CUDA error:\nan illegal memory access" in capsys.readouterr().err


def test_one_that_says_nothing_is_ended():
    (process,), loss = told(isolated_work.hangs, silence=2.0)
    assert loss == Loss("not done in 2 s")
    assert not is_running(process)
    (process,), loss = told(isolated_work.hangs, silence=60.0, seconds=2.0)
    assert loss == Loss("not done in the time left", late=True)
    assert not is_running(process)


def test_whoever_is_told_may_end_it():
    def tell(process):
        processes.append(process)
        raise KeyboardInterrupt

    processes = []
    with pytest.raises(KeyboardInterrupt):
        isolated(isolated_work.hangs, tell)
    assert not is_running(processes[0])


IMPORTS = """
import multiprocessing, sys, torch
touched = []
for name in ("is_available", "device_count", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, lambda *arguments: touched.append(1) or 0)
from effseg.common.isolation import PRELOADED
for name in PRELOADED:
    __import__(name)
sys.exit(bool(touched) or torch.cuda.is_initialized())
"""


def test_what_processes_are_forked_from_has_not_touched_a_gpu():
    """Else none of them could use it."""
    assert subprocess.run([sys.executable, "-c", IMPORTS], timeout=300).returncode == 0


@pytest.mark.slow
def test_where_the_server_has_used_a_gpu_processes_are_started_from_nothing(monkeypatch):
    monkeypatch.setattr(isolation, "_method", "forkserver")
    assert told(isolated_work.ForkedLate(os.getpid())) == (["from nothing"], None)
    assert isolation._method == "spawn"
