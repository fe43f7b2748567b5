"""Rows of the memory suite: what a training step needs, predicted and measured."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache, partial

import torch

from effseg.benchmarking import results
from effseg.benchmarking.failure import Failure, attempt
from effseg.benchmarking.record import Row, read
from effseg.benchmarking.registry import COMPILED, Case, Contender, missing
from effseg.benchmarking.trainee import GpuBytes, Trainee, gpu_peak
from effseg.errors import InputError
from effseg.memory import MemoryReport, measure_training_memory, peak_training_memory

FILE = "memory.json"
"""Of benchmarks/results: the committed predictions, see `benchmarks.predictions`."""


def predicted(case: Case, dtype: str, device: str = "cuda") -> Row:
    """From fake tensors: needs seconds, and neither the memory nor a GPU. device: cpu or cuda."""
    row = blank(case, dtype)
    reason = missing(case.contender) or unpredictable(case.contender)
    if reason:
        return replace(row, status="skipped", reason=reason)
    report = predict(case, dtype, device)
    return replace(
        row,
        bytes_predicted=report.peak,
        bytes_predicted_reserved=report.reserved if device == "cuda" else None,
        parameters=report.parameters,
        macs=None if case.contender.implementation == "triton" else report.macs,
    )


def unpredictable(contender: Contender) -> str | None:
    """Why no prediction exists."""
    if contender.implementation in COMPILED:
        return "what torch.compile keeps cannot be predicted"
    return None


@cache
def predict(case: Case, dtype: str, device: str = "cuda") -> MemoryReport:
    """The report of a contender that is neither `missing` nor `unpredictable`.

    Of ours, "auto" is predicted as it runs on a CPU, with ATen; Triton's kernels count no
    multiply-accumulates.
    """
    contender, workload = case
    for module in contender.requires:  # what a module makes when imported must not be fake
        importlib.import_module(module)
    # Fake weights cannot be laid out anew: such a network is built for real and copied.
    real = contender.implementation == "channels_last"
    model = contender.make(workload.classes) if real else partial(contender.make, workload.classes)
    with contender.active():
        return peak_training_memory(model, workload.shape, dtype=dtype, loss=contender.loss, device=device)


def known(case: Case, dtype: str) -> Row:
    """The committed prediction, for what has no time to make one: on a GPU that would wait. Of ours it is
    the one by ATen. Nothing where there is none."""
    contender, workload = case
    row, names = blank(case, dtype), {contender.name}
    if contender.is_ours and contender.implementation == "aten":
        names.add(contender.name.removesuffix("aten") + "auto")
    for found in _committed():
        if found.contender in names and (found.workload, found.dtype) == (workload.name, dtype):
            return replace(
                row,
                bytes_predicted=found.bytes_predicted,
                bytes_predicted_reserved=found.bytes_predicted_reserved,
                parameters=found.parameters,
                macs=found.macs,
            )
    return row


@cache
def _committed() -> tuple[Row, ...]:
    """None outside a checkout."""
    try:
        return read(results.FOLDER / FILE).rows
    except (InputError, OSError):
        return ()


def measured(case: Case, dtype: str, device: torch.device) -> Row:
    """The prediction, and beside it a real step on the device. Out of memory is a row."""
    row = known(case, dtype) if device.type == "cuda" else predicted(case, dtype, device.type)
    reason = missing(case.contender, device)
    if reason:
        return replace(row, status="skipped", reason=reason)
    row = replace(row, status="ok", reason="")
    return _on_gpu(row, case, dtype, device) if device.type == "cuda" else on_cpu(row, case, dtype)


def on_cpu(row: Row, case: Case, dtype: str) -> Row:
    """As torch's CPU allocator sees it; it reserves nothing."""
    contender, workload = case
    with contender.active():
        found = measure_training_memory(
            partial(contender.make, workload.classes),
            workload.shape,
            workload.classes,
            dtype=dtype,
            loss=contender.loss,
        )
    return replace(row, bytes_allocated=found.peak, bytes_outside_convolutions=found.outside_convolutions)


def _on_gpu(row: Row, case: Case, dtype: str, device: torch.device) -> Row:
    """The allocator's peaks, nothing else being on the GPU."""

    def run() -> tuple[int, GpuBytes]:
        trainee = Trainee(case, dtype, device)
        return trainee.parameters, gpu_peak(trainee, "train", alone=True)

    found = attempt(run)
    if isinstance(found, Failure):
        return replace(row, status=found.status, reason=found.reason)
    parameters, peak = found
    return replace(row, bytes_allocated=peak.allocated, bytes_reserved=peak.reserved, parameters=parameters)


def blank(case: Case, dtype: str) -> Row:
    contender, workload = case
    return Row("memory", contender.name, workload.name, dtype, voxels=workload.voxels)
