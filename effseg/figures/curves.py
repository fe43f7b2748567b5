"""Curves of a training run."""

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from effseg.errors import InputError
from effseg.figures.canvas import new_figure, organ_colours, save

_COLUMNS = ("step", "seconds", "learning_rate", "loss")


def draw_curves(csv_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw loss, learning rate and validation Dice over the optimiser's steps.

    The CSV has a header and one row a step logged, with the columns ``step``, ``epoch``, ``seconds`` (since
    the start), ``learning_rate``, ``loss`` (mean since the last row), and on rows of a validation
    ``dice_mean`` and ``dice_<organ>`` for each organ (0 to 1; empty elsewhere, and where no case has the
    organ). Further columns are left alone.

    Raises: InputError when the file is no such table or has no row yet.
    """
    table = _read_progress(Path(csv_path))
    figure = new_figure(9, 8.5)
    loss_axes, rate_axes, dice_axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.2, 3.2))
    step = table["step"]
    _draw_loss(loss_axes, step, table["loss"])
    rate_axes.plot(step, table["learning_rate"], color="0.3")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _draw_dice(dice_axes, step, table)
    dice_axes.set_xlabel("optimiser step")
    for axes in (loss_axes, rate_axes, dice_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    hours, rest = divmod(int(table["seconds"][-1]), 3600)
    elapsed = f"{hours} h {rest // 60:02d} min {rest % 60:02d} s"
    figure.suptitle(f"{int(step[-1])} steps in {elapsed}", x=0.02, ha="left")
    save(figure, png_path)


def _read_progress(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"{path}: expected a training log (CSV), found no file")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{path}: expected a training log with the column {missing[0]}, found none")
        rows = [row for row in reader if all(row[name] for name in _COLUMNS)]  # the last may be half-written
    if not rows:
        raise InputError(f"{path}: expected at least one row in the training log, found none")
    columns = [*_COLUMNS, *(name for name in rows[0] if name and name.startswith("dice_"))]
    try:
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns}
    except ValueError as error:
        raise InputError(f"{path}: expected numbers in the training log: {error}") from None


def _draw_loss(axes: Any, step: np.ndarray, loss: np.ndarray) -> None:
    axes.plot(step, loss, color="tab:blue", alpha=0.3, linewidth=0.8, label="as logged")
    window = max(1, len(loss) // 20)
    if window > 1:
        mean = np.convolve(loss, np.ones(window) / window, "valid")
        axes.plot(step[window // 2 :][: len(mean)], mean, color="tab:blue", label=f"mean of {window} around")
        axes.legend(frameon=False)
    axes.set_ylabel("training loss")


def _draw_dice(axes: Any, step: np.ndarray, table: dict[str, np.ndarray]) -> None:
    organs = [name[5:] for name in table if name.startswith("dice_") and name != "dice_mean"]
    if "dice_mean" in table:
        style = {"color": "black", "linewidth": 2.5, "markersize": 4, "zorder": 3}
        _draw_validation(axes, step, table["dice_mean"], "mean", **style)
    for organ, colour in zip(organs, organ_colours(len(organs)), strict=True):
        _draw_validation(axes, step, table[f"dice_{organ}"], organ, color=colour, linewidth=1, markersize=2.5)
    axes.set_ylabel("validation Dice")
    axes.set_ylim(0, 1)
    if not axes.get_lines():
        return
    columns = 1 + len(organs) // 24
    axes.legend(
        title="latest",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize="small",
        ncols=columns,
    )


def _draw_validation(axes: Any, step: np.ndarray, dice: np.ndarray, name: str, **style: Any) -> None:
    known = np.isfinite(dice)
    last = f" {dice[known][-1]:.3f}" if known.any() else ""
    axes.plot(step[known], dice[known], marker="o", label=f"{name}{last}", **style)
