"""Which configuration a kernel is launched with: a measured one, else the heuristics'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from effseg.common.settings import Setting
from effseg.kernels.config import ATEN, INTERPRETER, Config, Problem
from effseg.kernels.heuristics import by_heuristic
from effseg.kernels.tuned import read_tuned, tuned_files

Answer = Callable[[Problem], Config]
_answer: Setting[Answer | None] = Setting("effseg_answer", None)


def choose(problem: Problem) -> Config:
    """The configuration for a problem: from the user's tuned file, from the one shipped for that GPU, by the
    heuristics. `uses_aten` says whether it leaves the problem to ATen."""
    if (answer := _answer.get()) is not None:
        return answer(problem)
    if problem.architecture != INTERPRETER:
        for path in tuned_files(problem.gpu):
            config = read_tuned(path).find(problem)
            if config is not None:
                return config
    return by_heuristic(problem)


def uses_aten(config: Config) -> bool:
    return config.loop == ATEN


@contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Inside, `choose` gives what `answer` says, and so tells it every problem that is met."""
    with _answer.set(answer):
        yield
