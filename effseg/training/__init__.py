"""Training of segmentation networks on whole CT volumes."""

from effseg.training.config import TrainingConfig
from effseg.training.loop import train
from effseg.training.result import TrainingResult

__all__ = ["TrainingConfig", "TrainingResult", "train"]
