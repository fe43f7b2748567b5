"""Memory of a training step: predicted, measured, planned with."""

from effseg.memory.measure import MeasuredMemory, measure_training_memory
from effseg.memory.planner import Plan, Request, plan
from effseg.memory.predict import peak_training_memory
from effseg.memory.report import LiveTensor, MemoryReport

__all__ = [
    "LiveTensor",
    "MeasuredMemory",
    "MemoryReport",
    "Plan",
    "Request",
    "measure_training_memory",
    "peak_training_memory",
    "plan",
]
