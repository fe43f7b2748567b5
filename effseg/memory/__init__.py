"""Memory of a training step: predicted, measured, planned with."""

from effseg.memory.predict import peak_training_memory
from effseg.memory.report import LiveTensor, MemoryReport

__all__ = ["LiveTensor", "MemoryReport", "peak_training_memory"]
