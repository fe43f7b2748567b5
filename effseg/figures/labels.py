"""What is written beside a plot: labels in a column, each joined to its point, and numbers along an axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Colour = str | tuple[float, float, float]


@dataclass(frozen=True)
class Labelled:
    """A point in data coordinates."""

    text: str
    x: float
    y: float
    colour: Colour
    bold: bool = False


def label_beside(axes: Any, points: Sequence[Labelled], size: float = 8.0) -> None:
    """Write the points' texts right of the axes, in which all else is drawn; they do not overlap.

    size: of the type, in points.
    """
    axes.autoscale_view()  # else done when the picture is, after the places have been looked up
    height = axes.get_position().height * axes.figure.get_figheight() * 72  # points
    across = axes.transData + axes.transAxes.inverted()
    wanted = [float(across.transform((point.x, point.y))[1]) for point in points]
    for point, y in zip(points, spread(wanted, 1.5 * size / height), strict=True):
        axes.annotate(
            point.text,
            (point.x, point.y),
            (1.04, y),
            textcoords="axes fraction",
            fontsize=size,
            va="center",
            color=point.colour,
            weight="bold" if point.bold else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": point.colour,
                "linewidth": 0.5,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
            },
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1], at least `gap` apart and in the order of those wanted, whose squared distances from
    them are least. Where so many gaps do not fit they shrink."""
    count = len(wanted)
    if count < 2:
        return [min(max(y, 0.0), 1.0) for y in wanted]
    gap = min(gap, 1 / (count - 1))
    order = np.argsort(wanted, kind="stable")
    # Without the gaps this is the nearest non-decreasing sequence: means of pools of adjacent violators.
    pools: list[tuple[float, int]] = []
    for i, place in enumerate(order):
        mean, size = wanted[place] - i * gap, 1
        while pools and pools[-1][0] > mean:
            before, others = pools.pop()
            mean, size = (mean * size + before * others) / (size + others), size + others
        pools.append((mean, size))
    means = [mean for mean, size in pools for _ in range(size)]
    found = [0.0] * count
    for i, place in enumerate(order):
        found[place] = min(max(means[i], 0.0), 1 - (count - 1) * gap) + i * gap
    return found


def plain_logarithmic(axis: Any, marked: Sequence[float] = (1, 1.5, 2, 3, 5, 7)) -> None:
    """Numbers as people write them, at these of each decade."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=marked))
    axis.set_major_formatter(FormatStrFormatter("%.4g"))
    axis.set_minor_locator(NullLocator())
