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
    allocated is freed. Where that is refused too, the GPU is lost to this process, and it has "failed"."""
    try:
        return function()
    except Exception as error:  # of anybody's network, compiler or driver
        found = failure(error)
    gc.collect()  # graphs may hold cycles
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # a fault that stays: every call from now on raises the one that was caught
            return Failure("failed", found.reason)
    return found


def failure(error: BaseException) -> Failure:
    """What becomes of a row that ended in this error."""
    if _is_out_of_memory(error):
        return Failure("out of memory", one_line(str(error) or "no memory left"))
    return Failure("wrong", one_line(f"{type(error).__name__}: {error}"))


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def one_line(text: str) -> str:
    return " ".join(text.split())[:MOST_CHARACTERS]
