"""What a training run gives back."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingResult:
    """What a run gave.

    best, final: weight files; `best` is None without validation. best_dice, final_dice: organ -> mean Dice
    over the validation cases, NaN for an organ in none of them; empty without validation.
    losses: of every step since the start of the run. steps_per_second: of this call, without validation;
    NaN when nothing was left to do. processor_seconds: what all steps since the start of the run
    took of this process's threads, without validation and checkpoints, whatever else the machine did.
    peak_memory: bytes, see `display.peak_memory`. skipped: steps without an update, since
    their gradient or running statistics were not finite.
    """

    final: Path
    best: Path | None
    best_step: int
    best_dice: dict[str, float]
    final_dice: dict[str, float]
    losses: list[float]
    steps_per_second: float
    processor_seconds: float
    peak_memory: int
    skipped: int

    @property
    def checkpoint(self) -> Path:
        """The weights to use: the best ones, else the final ones."""
        return self.best or self.final
