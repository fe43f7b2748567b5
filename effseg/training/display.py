"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from effseg.training.records import mean_dice

LINE_EVERY = 30.0  # seconds between two lines where no terminal shows the live one
MEAN_OVER = 20  # steps over which the shown loss is averaged


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU so far; on a CPU the most that the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def duration(seconds: float) -> str:
    """`seconds` as h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@dataclass
class Display:
    """Progress of one run from step `first` to step `steps`; nothing at all with console None."""

    console: Console | None
    steps: int
    first: int
    device: torch.device
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=MEAN_OVER))
    _dice: float | None = None
    _bar: Progress | None = None

    def __enter__(self) -> "Display":
        self._started = self._line_at = time.monotonic()
        if self.console is not None and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self.console, auto_refresh=False)
            self._task = self._bar.add_task("", total=self.steps, completed=self.first)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, epoch: int, loss: float) -> None:
        """Show that `step` steps are done."""
        self._losses.append(loss)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._text(step, epoch), refresh=True)
        elif time.monotonic() - self._line_at >= LINE_EVERY or step == self.steps:
            self._line_at = time.monotonic()
            self.say(f"step {step}/{self.steps}  {self._text(step, epoch)}")

    def validation(self, step: int, organs: Sequence[str], dice: Sequence[float]) -> None:
        """Print one validation's Dice, the mean and every organ's."""
        self._dice = mean_dice(dice)
        values = "  ".join(f"{organ} {value:.3f}" for organ, value in zip(organs, dice, strict=True))
        self.say(f"step {step}/{self.steps}  validation Dice {self._dice:.3f}  ({values})")

    def _text(self, step: int, epoch: int) -> str:
        left = (time.monotonic() - self._started) / (step - self.first) * (self.steps - step)
        parts = [f"epoch {epoch}", f"loss {sum(self._losses) / len(self._losses):.4f}"]
        if self._dice is not None:
            parts.append(f"Dice {self._dice:.3f}")
        parts.append(f"peak {peak_memory(self.device) / 2**30:.2f} GiB")
        return "  ".join([*parts, f"{duration(left)} left"])
