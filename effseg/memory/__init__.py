"""Memory of a training step: predicted, measured, chosen for."""

from effseg.memory.choice import Choice
from effseg.memory.measure import MeasuredMemory, measure_training_memory
from effseg.memory.predict import peak_training_memory
from effseg.memory.report import LiveTensor, MemoryReport

__all__ = [
    "Choice",
    "LiveTensor",
    "MeasuredMemory",
    "MemoryReport",
    "measure_training_memory",
    "peak_training_memory",
]
