"""Work in a process of its own: a fault of the GPU, a crash or a hang ends that process and nothing else.

A CUDA error such as an illegal address stays with its process: every later call raises it again. Processes
are forked from a server that has imported PRELOADED and never used a GPU, so that one costs little more than
its CUDA context. Where some import has used it after all, they are started from nothing instead.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

PRELOADED = ["effseg.benchmarking.suites", "benchmarks.kernel_checks"]
"""Modules that most of the work here needs; importing them should not touch a GPU."""
MOST_CHARACTERS = 300
PATIENCE = 10.0
"""Seconds that a killed process may take to end; one that the driver holds on to is left behind."""

Tell = Callable[[Any], object]
_method = "forkserver"


class Loss(NamedTuple):
    """Why not all was told, in one line. late: it was only begun too late."""

    reason: str
    late: bool = False


class _Ended(NamedTuple):
    """The last message. error: None of a process that came to its end; forked_late: it has done nothing, for
    what it was forked from has used a GPU."""

    error: Loss | None
    forked_late: bool = False


def isolated(
    run: Callable[[Tell], object], tell: Tell, *, silence: float = math.inf, seconds: float = math.inf
) -> Loss | None:
    """Call run(tell) in a process of its own, whose `tell` passes what it is given on to this one's.

    run: a function of a module, or a partial of one: it is pickled, and so is what it tells. silence: seconds
    without a word after which the process is killed; seconds: in all. Returns None where all was told. What
    the process writes to stderr comes at its end.
    """
    global _method
    deadline = time.monotonic() + seconds
    last = _asked(run, tell, silence, deadline)
    if last.forked_late:
        _method = "spawn"
        last = _asked(run, tell, silence, deadline)
    return last.error


def _asked(run: Callable[[Tell], object], tell: Tell, silence: float, deadline: float) -> _Ended:
    # torch asks the driver's library whether there is a GPU, which uses none, and not CUDA.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context: Any = multiprocessing.get_context(_method)
    context.set_forkserver_preload(list(PRELOADED))
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="effseg-") as folder, ours:
        errors = Path(folder) / "stderr"
        process = context.Process(target=_child, args=(run, theirs, str(errors)))
        process.start()
        theirs.close()
        try:
            last = _followed(ours, tell, silence, deadline)
            return last or _Ended(Loss(f"its process ended: {_end(process)}{_last_line(errors)}"))
        finally:
            process.kill()
            process.join(PATIENCE)
            if errors.exists():
                sys.stderr.write(errors.read_text(encoding="utf-8", errors="replace"))


def _followed(pipe: Connection, tell: Tell, silence: float, deadline: float) -> _Ended | None:
    """The process's last message; None where it ended without one."""
    while True:
        left = min(silence, deadline - time.monotonic())
        if not pipe.poll(None if left == math.inf else max(0.0, left)):
            late = left < silence
            return _Ended(Loss("not done in the time left" if late else f"not done in {silence:g} s", late))
        try:
            message = pipe.recv()
        except (EOFError, ConnectionResetError):
            return None
        if isinstance(message, _Ended):
            return message
        tell(message)


def _end(process: multiprocessing.process.BaseProcess) -> str:
    process.join(PATIENCE)
    code = process.exitcode
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f": {' '.join(last.split())[:MOST_CHARACTERS]}" if last else ""


# In the process


def _child(run: Callable[[Tell], object], pipe: Connection, errors: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: whoever asked for this process ends it
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if torch.cuda._is_in_bad_fork():
        pipe.send(_Ended(None, forked_late=True))
        return
    try:
        run(pipe.send)
        error = None
    except Exception as caught:
        error = Loss(" ".join(f"{type(caught).__name__}: {caught}".split())[:MOST_CHARACTERS])
    pipe.send(_Ended(error))


def _end_with_parent() -> None:
    """A process whose asker was killed must not keep the GPU busy."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
