"""A GPU that is not there: importing this lets benchmarks run on one whose networks are not run.

Every measurement is a line of the file that FAKE_NOTES names. FAULTS, as in "3:sticky 5:abort", says what
becomes of the third and the fifth: an error that stays (as a device-side assert does), the end of the
process, no end (hang), no memory (oom). `python -m fake_gpu MODULE ARGUMENTS` runs a module on it.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from effseg import doctor
from effseg.benchmarking import gate, throughput, timing
from effseg.common import isolation

GPU = "NVIDIA Fake GPU"
ALLOCATED, RESERVED, PARAMETERS = 10 * 2**30, 11 * 2**30, 1_760_000
STICKY = "CUDA error: device-side assert triggered"

broken = False


def measuring(what: str) -> None:
    """Note it, and have the fault that it is to have."""
    global broken
    path = Path(os.environ["FAKE_NOTES"])
    with path.open("a") as notes:
        print(what, file=notes)
    number = len(path.read_text().splitlines())
    faults = dict(fault.split(":") for fault in os.environ.get("FAULTS", "").split())
    fault = faults.get(str(number))
    if fault == "sticky":
        broken = True
        call()
    elif fault == "abort":
        print("terminate called after throwing an instance of 'c10::Error'", file=sys.stderr, flush=True)
        os.abort()
    elif fault == "hang":
        path.with_suffix(".hung").write_text(str(os.getpid()))
        time.sleep(600)
    elif fault == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")


def call(*arguments: object) -> None:
    """Whatever is asked of the driver."""
    if broken:
        raise RuntimeError(STICKY)


class Trainee:
    """In place of a network on the device."""

    parameters = PARAMETERS

    def __init__(self, case, dtype, device, batches=None) -> None:
        self.case, self.device, self.noted = case, device, False

    def tensors(self):
        return iter(())

    def turn(self, task):
        return lambda: self._run(task)

    def _run(self, task) -> None:
        call()
        if not self.noted:
            self.noted = True
            measuring(f"{self.case.contender.name}, {self.case.workload.name}, {task}")


def compared(case, twin, dtype, device) -> tuple[str, str]:
    measuring(f"{case.contender.name} against {twin.name}")
    return "", "relative error 1.0e-03 of the loss"


def diagnose():
    measuring("doctor")
    return {"checks": [{"name": "gpu", "state": "ok", "detail": GPU}]}


properties = SimpleNamespace(name=GPU, total_memory=141 * 2**30, major=9, minor=0, uuid="0")
for name, answer in {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: GPU,
    "get_device_properties": lambda device=None: properties,
    "get_device_capability": lambda device=None: (9, 0),
    "empty_cache": call,
    "synchronize": call,
    "reset_peak_memory_stats": call,
    "memory_allocated": lambda device=None: ALLOCATED,
    "memory_reserved": lambda device=None: RESERVED,
    "max_memory_allocated": lambda device=None: ALLOCATED,
    "max_memory_reserved": lambda device=None: RESERVED,
}.items():
    setattr(torch.cuda, name, answer)
throughput.Trainee = Trainee
gate.verdict = lambda *arguments: ""
gate.compared = compared
doctor.diagnose = diagnose
timing.gpu_seconds = lambda device, turn, flush_bytes=0: timing.host_seconds(turn)
isolation.PRELOADED = [*isolation.PRELOADED, "fake_gpu"]


if __name__ == "__main__":
    import fake_gpu  # noqa: F401 # under its own name, as in the processes

    _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
