"""Pictures of a training run and of a segmentation, drawn without any global state of matplotlib."""

from effseg.figures.curves import draw_curves
from effseg.figures.overlay import draw_overlay

__all__ = ["draw_curves", "draw_overlay"]
