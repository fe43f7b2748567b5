"""Attempts: what fails becomes a failure, also where nothing can be called any more."""

import pytest
import torch

from effseg.benchmarking.failure import Failure, attempt

FAULT = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def lost(monkeypatch):
    """A GPU that answers every call with the fault that it once had."""

    def fault(*arguments):
        raise RuntimeError(FAULT)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fault)
    return fault


def test_a_fault_that_stays_is_told_and_not_raised(lost):
    assert attempt(lost) == Failure("failed", f"RuntimeError: {FAULT}")


def test_an_error_that_passes_is_the_contenders(monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    assert attempt(lambda: 1 / 0) == Failure("wrong", "ZeroDivisionError: division by zero")
    assert freed
