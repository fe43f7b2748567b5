"""What a run writes down while it runs: progress.csv and TensorBoard's files."""

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

from effseg.common.atomic import atomic_path

COLUMNS = ("step", "epoch", "seconds", "learning_rate", "loss", "gradient_norm")


class Records:
    """progress.csv, one row a step and flushed, and the same numbers for TensorBoard.

    folder: the run's. organs: names of the classes above background, in order.
    step: steps done so far; rows behind it, which a killed run wrote after its last checkpoint, are removed.
    """

    def __init__(self, folder: Path, organs: Sequence[str], step: int) -> None:
        from tensorboardX import SummaryWriter

        self.organs = tuple(organs)
        self.columns = (*COLUMNS, "dice_mean", *(f"dice_{organ}" for organ in organs))
        self.path = folder / "progress.csv"
        self._cut(step)
        self._file = self.path.open("a", encoding="utf-8", newline="")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=30)

    def add(
        self,
        step: int,
        epoch: int,
        seconds: float,
        learning_rate: float,
        loss: float,
        gradient_norm: float,
        dice: Sequence[float] | None = None,
    ) -> None:
        """Write one step's row. dice: one value per organ on steps with a validation, NaN where absent."""
        numbers = dict(zip(self.columns[3:6], (learning_rate, loss, gradient_norm), strict=True))
        if dice is not None:
            numbers |= dict(zip(self.columns[6:], (mean_dice(dice), *dice), strict=True))
        row = [str(step), str(epoch), f"{seconds:.2f}"]
        row += [repr(float(numbers[name])) if name in numbers else "" for name in self.columns[3:]]
        self._file.write(_line(row))
        self._file.flush()
        for name, value in numbers.items():
            if math.isfinite(value):
                self._board.add_scalar(name.replace("dice_", "dice/"), value, step)

    def flush(self) -> None:
        """Bring progress.csv to the disk, before a checkpoint claims that these steps are done."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _cut(self, step: int) -> None:
        """Columns are taken by their place: an organ may have got a new name since."""
        rows = read_rows(self.path) if step else []
        kept = [[row[name] for name in row] for row in rows if int(row["step"]) <= step]
        with atomic_path(self.path) as temporary:
            lines = [_line(self.columns), *map(_line, kept)]
            temporary.write_text("".join(lines), encoding="utf-8", newline="")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a progress.csv; a last line without its end, cut by a kill, is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def mean_dice(dice: Sequence[float]) -> float:
    """Mean over the organs that have a value; NaN where none has."""
    present = [value for value in dice if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan


def _line(values: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
