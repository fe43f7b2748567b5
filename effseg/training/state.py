"""How far a run is: what a checkpoint remembers beside the weights and the optimizer."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RunState:
    """step: done steps. seconds: spent so far, over all continuations. processor_seconds: of the process's
    threads, in its steps, for comparisons that a busy machine must not decide. skipped: steps without an
    update, since their gradient or running statistics were not finite; skipped_in_a_row: the last ones of
    them. best_dice, last_dice: per organ, of the best and the last validation; best_step: when the best was,
    0 for never."""

    step: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_step: int = 0
    best_dice: list[float] = field(default_factory=list)
    last_dice: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunState":
        return cls(**values)
