"""Training of segmentation networks on whole CT volumes."""

from effseg.training.config import TrainingConfig

__all__ = ["TrainingConfig"]
