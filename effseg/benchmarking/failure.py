"""What a contender cannot do becomes a row, and the others go on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
MOST_CHARACTERS = 200


@dataclass(frozen=True)
class Failure:
    """status: of record.STATUSES, any but "ok"; reason: one line."""

    status: str
    reason: str


def attempt(function: Callable[[], T]) -> T | Failure:
    """What the function gives. Out of memory is a failure, any other error makes it "wrong"; what it had
    allocated is freed."""
    try:
        return function()
    except Exception as error:  # of anybody's network, compiler or driver
        found = _failure(error)
    gc.collect()  # graphs may hold cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _failure(error: Exception) -> Failure:
    if _is_out_of_memory(error):
        return Failure("out of memory", _line(str(error) or "no memory left"))
    return Failure("wrong", _line(f"{type(error).__name__}: {error}"))


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _line(text: str) -> str:
    return " ".join(text.split())[:MOST_CHARACTERS]
