"""What is asked of a GPU before anything is timed on it: is all installed, and do both algorithms agree?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from effseg import doctor
from effseg.benchmarking import gate
from effseg.benchmarking.groups import Show
from effseg.benchmarking.record import CHECKS, Row
from effseg.benchmarking.registry import Case, contenders, missing, workloads

DOCTOR = Row(CHECKS, "doctor", "every device", "all", "doctor")
VOLUME = "128x128x128, 15 classes"


def diagnosis(wanted: Sequence[Row], seconds: float, show: Show) -> None:
    """`effseg doctor`, its answers in one row."""
    checks = doctor.diagnose()["checks"]
    faults = [check for check in checks if check["state"] == "fault"]
    told = "; ".join(f"{check['name']}: {check['detail']}" for check in faults or checks)
    show(replace(DOCTOR, status="wrong" if faults else "ok", reason=told))


def gradients_row(memory: str, dtype: str) -> Row:
    return Row(CHECKS, f"effseg-base/{memory}/triton", VOLUME, dtype, "gradients")


def gradients(
    memory: str, dtype: str, device: torch.device, wanted: Sequence[Row], seconds: float, show: Show
) -> None:
    """One step by Triton's kernels beside the same by ATen: the loss and all gradients."""
    row = gradients_row(memory, dtype)
    ours, twin = (contenders()[f"effseg-base/{memory}/{how}"] for how in ("triton", "aten"))
    if reason := missing(ours, device):
        show(replace(row, status="skipped", reason=reason))
        return
    wrong, errors = gate.compared(Case(ours, workloads()[VOLUME]), twin, dtype, device)
    show(replace(row, status="wrong" if wrong else "ok", reason=wrong or errors))
