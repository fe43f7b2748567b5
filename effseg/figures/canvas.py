"""What the pictures share: a figure of its own, colours of organs, the file."""

import os
import warnings
from typing import Any

from effseg.common.atomic import atomic_path

Colour = tuple[float, float, float]


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of this size in inches, known to no pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def save(figure: Any, png_path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, atomically. Letters that the font lacks become boxes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with atomic_path(png_path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for the letter
        figure.savefig(temporary, format="png")


def organ_colours(count: int) -> list[Colour]:
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
