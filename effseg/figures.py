"""Pictures of a training run and of a segmentation, drawn without any global state of matplotlib."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effseg.atomic import atomic_path
from effseg.errors import InputError

Colour = tuple[float, float, float]


# ------------------------------------------------------------------------------------------- curves


def draw_curves(csv_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw loss, learning rate and validation Dice over the optimiser's steps.

    The CSV has a header and one row a step logged, with the columns ``step``, ``epoch``, ``seconds`` (since
    the start), ``learning_rate``, ``loss`` (mean since the last row), and on rows of a validation
    ``dice_mean`` and ``dice_<organ>`` for each organ (0 to 1; empty elsewhere, and where no case has the
    organ). Further columns are left alone.

    Raises: InputError when the file is no such table or has no row yet.
    """
    table = _read_progress(Path(csv_path))
    figure = _figure(9, 8.5)
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
    _save(figure, png_path)


def _read_progress(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"{path}: expected a training log (CSV), found no file")
    with path.open(newline="") as file:
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


_COLUMNS = ("step", "seconds", "learning_rate", "loss")


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
    for organ, colour in zip(organs, _colours(len(organs)), strict=True):
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


# ------------------------------------------------------------------------------------------ overlay


@dataclass(frozen=True)
class _View:
    """A plane through a RAS+ volume and how radiologists look at it."""

    name: str
    axis: int  # the array axis that the plane cuts
    across: int  # the array axis drawn from left to right
    up: int  # the array axis drawn upwards
    sides: tuple[str, str]  # anatomical directions at the viewer's left and right


# Patient's right (axial, coronal) and anterior (sagittal) lie at the viewer's left: the axis runs leftwards.
_VIEWS = (
    _View("axial", axis=2, across=0, up=1, sides=("R", "L")),
    _View("coronal", axis=1, across=0, up=2, sides=("R", "L")),
    _View("sagittal", axis=0, across=1, up=2, sides=("A", "P")),
)
_ENDS = {1: ("A", "P"), 2: ("S", "I")}  # directions at the top and bottom of an axis drawn upwards


def draw_overlay(
    image: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    png_path: str | os.PathLike[str],
    reference: np.ndarray | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    window: tuple[float, float] = (-200.0, 400.0),
) -> None:
    """Draw organs over an axial, a coronal and a sagittal slice, seen as radiologists see them.

    On every axis the slice is taken that crosses the most organs, the one nearest to the middle of the
    foreground among equals. Patient's right lies at the viewer's left.

    Args:
        image: (X, Y, Z) or (1, X, Y, Z), RAS+, HU or any unit that `window` is in.
        labels: class indices (X, Y, Z), the prediction.
        names: name of every class, background first.
        png_path: written atomically.
        reference: class indices (X, Y, Z): drawn below the prediction, and the legend gives Dice per organ.
        spacing: mm along X, Y, Z: sets the pictures' aspect.
        window: values drawn black and white.
    """
    from matplotlib.patches import Patch

    image = image[0] if image.ndim == 4 else image
    maps = {"segmentation": labels} if reference is None else {"prediction": labels, "reference": reference}
    for title, volume in maps.items():
        if volume.shape != image.shape:
            raise ValueError(f"{title}: expected the image's shape {image.shape}, got {volume.shape}")
    extents = [length * edge for length, edge in zip(image.shape, spacing, strict=True)]
    colours = _colours(len(names) - 1)
    places = _slices(labels if reference is None else reference, len(names))

    widths = [extents[view.across] for view in _VIEWS]
    height = max(extents[view.up] for view in _VIEWS)
    scale = 11.0 / sum(widths)
    figure = _figure(11.0 + 2.4, max(2.5, (height * scale + 0.45) * len(maps)))
    grid = figure.subplots(len(maps), len(_VIEWS), width_ratios=widths, squeeze=False)
    for row, (title, volume) in zip(grid, maps.items(), strict=True):
        for axes, view, place in zip(row, _VIEWS, places, strict=True):
            grey = np.clip((_plane(image, view, place) - window[0]) / (window[1] - window[0]), 0, 1)
            frame = (0.0, extents[view.across], 0.0, extents[view.up])
            axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=frame, origin="lower")
            organs = _tint(_plane(volume, view, place), colours)
            axes.imshow(organs, extent=frame, origin="lower", interpolation="nearest")
            axes.set_title(f"{title}, {view.name}", fontsize="medium")
            _mark_directions(axes, view)

    dice = _dice_texts(labels, reference, len(names))
    patches = [
        Patch(color=colour, label=f"{name}{text}")
        for name, colour, text in zip(names[1:], colours, dice, strict=True)
    ]
    figure.legend(
        handles=patches,
        title=None if reference is None else "Dice of the volume",
        loc="outside right center",
        frameon=False,
        fontsize="small",
        ncols=1 + len(patches) // 32,
    )
    _save(figure, png_path)


def _plane(volume: np.ndarray, view: _View, place: int) -> np.ndarray:
    """The slice as rows from bottom to top and columns from the viewer's left to right."""
    plane = np.take(volume, place, axis=view.axis)  # its axes keep their order: across, up
    return plane[::-1].T


def _slices(labels: np.ndarray, num_classes: int) -> list[int]:
    from scipy.ndimage import find_objects

    boxes = [box for box in find_objects(labels, max_label=num_classes - 1) if box is not None]
    places = []
    for view in _VIEWS:
        length = labels.shape[view.axis]
        spans = [box[view.axis] for box in boxes] or [slice(0, length)]
        crossed = np.zeros(length, int)
        for span in spans:
            crossed[span] += 1
        middle = (min(span.start for span in spans) + max(span.stop for span in spans) - 1) / 2
        candidates = np.flatnonzero(crossed == crossed.max())
        places.append(int(candidates[np.abs(candidates - middle).argmin()]))
    return places


def _tint(plane: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """RGBA of a slice of class indices: organs translucent with an opaque rim, background clear."""
    table = np.array([(0.0, 0.0, 0.0, 0.0), *((*colour, 0.45) for colour in colours)])
    rgba = table[plane]
    padded = np.pad(plane, 1, mode="edge")
    rim = np.zeros(plane.shape, bool)
    for shifted in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        rim |= shifted != plane
    rgba[rim & (plane > 0), 3] = 0.85
    return rgba


def _mark_directions(axes: Any, view: _View) -> None:
    from matplotlib.patheffects import withStroke

    axes.set_xticks([])
    axes.set_yticks([])
    left, right = view.sides
    top, bottom = _ENDS[view.up]
    outline = [withStroke(linewidth=2, foreground="black")]
    for letter, x, y, horizontal, vertical in (
        (left, 0.02, 0.5, "left", "center"),
        (right, 0.98, 0.5, "right", "center"),
        (top, 0.5, 0.98, "center", "top"),
        (bottom, 0.5, 0.02, "center", "bottom"),
    ):
        axes.text(
            x,
            y,
            letter,
            transform=axes.transAxes,
            ha=horizontal,
            va=vertical,
            color="white",
            weight="bold",
            path_effects=outline,
        )


def _dice_texts(labels: np.ndarray, reference: np.ndarray | None, num_classes: int) -> list[str]:
    if reference is None:
        return [""] * (num_classes - 1)
    from effseg.metrics import dice_per_class

    dice = dice_per_class(labels, reference, num_classes)[1:]
    return [f" {value:.3f}" if np.isfinite(value) else " absent" for value in dice]


# ------------------------------------------------------------------------------------------- shared


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _save(figure: Any, png_path: str | os.PathLike[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png")


def _colours(count: int) -> list[Colour]:
    """Colours told apart at a glance, on white and on grey; past ten, hues a golden angle apart."""
    from matplotlib.colors import hsv_to_rgb, to_rgb

    if count <= len(_PALETTE):
        return [to_rgb(name) for name in _PALETTE[:count]]
    hsv = ((n * 0.618034 % 1, 0.55 + 0.45 * (n % 2), 0.65 if n % 3 == 2 else 1.0) for n in range(count))
    return [to_rgb(tuple(hsv_to_rgb(colour))) for colour in hsv]


_PALETTE = (
    "#3d8fe0",  # blue
    "#f28e2b",  # orange
    "#3fae3a",  # green
    "#e0383c",  # red
    "#9a6bff",  # violet
    "#a0622d",  # brown
    "#ff6fc0",  # pink
    "#00b8b8",  # turquoise
    "#d4b000",  # gold
    "#8fd14f",  # lime
)
