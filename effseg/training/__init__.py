"""Training of segmentation networks on whole CT volumes."""

from effseg.training.config import TrainingConfig
from effseg.training.loop import TrainingResult, train

__all__ = ["TrainingConfig", "TrainingResult", "train"]
