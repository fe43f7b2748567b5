"""A segmentation over slices of its scan."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effseg.evaluation.metrics import dice_per_class
from effseg.figures.canvas import Colour, new_figure, organ_colours, save


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

    Raises: ValueError for label maps of another shape than the image's.
    """
    from matplotlib.patches import Patch

    image = image[0] if image.ndim == 4 else image
    maps = {"segmentation": labels} if reference is None else {"prediction": labels, "reference": reference}
    for title, volume in maps.items():
        if volume.shape != image.shape:
            raise ValueError(f"{title}: expected the image's shape {image.shape}, got {volume.shape}")
    extents = [length * edge for length, edge in zip(image.shape, spacing, strict=True)]
    colours = organ_colours(len(names) - 1)
    places = _slices(labels if reference is None else reference, len(names))

    widths = [extents[view.across] for view in _VIEWS]
    height = max(extents[view.up] for view in _VIEWS)
    scale = 11.0 / sum(widths)
    figure = new_figure(11.0 + 2.4, max(2.5, (height * scale + 0.45) * len(maps)))
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
    save(figure, png_path)


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
    dice = dice_per_class(labels, reference, num_classes)[1:]
    return [f" {value:.3f}" if np.isfinite(value) else " absent" for value in dice]
