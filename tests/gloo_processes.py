"""Functions run in processes of gloo, which are forked: importing torch and effseg takes seconds."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def in_processes(size, function, *arguments, timeout=300, tolerant=False):
    """[function(*arguments) for every process of a gloo group]; tolerant: the text of the error in place of
    what a process could not return, None of one that was killed."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        processes = [
            context.Process(target=_work, args=(folder, rank, size, function, arguments))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        found = [_result(Path(folder, str(rank))) for rank in range(size)]
    assert not hung, f"{len(hung)} of {size} processes did not end in {timeout} s"
    if not tolerant:
        for one in found:
            if not isinstance(one, tuple) or one[0] != "found":
                raise RuntimeError(str(one))
    return [None if one is None else one[1] for one in found]


def _result(path):
    return torch.load(path, weights_only=False) if path.exists() else None


def _work(folder, rank, size, function, arguments):
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    meeting = f"file://{folder}/meeting"
    try:
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        found = ("found", function(*arguments))
    except Exception:  # whatever it is, the parent raises it: this process has nobody to tell
        found = ("error", traceback.format_exc())
    torch.save(found, Path(folder, f"{rank}.new"))
    os.rename(Path(folder, f"{rank}.new"), Path(folder, str(rank)))
    if found[0] == "found":
        dist.barrier()
    os._exit(0)  # nothing of the parent's is to be torn down
