"""Memory of a training step: predicted, measured, planned with."""

from effseg.memory.choice import Choice, choose, configure
from effseg.memory.measure import MeasuredMemory, measure_training_memory
from effseg.memory.predict import peak_training_memory
from effseg.memory.report import LiveTensor, MemoryReport
from effseg.planning.planner import Plan, Request, plan

__all__ = [
    "Choice",
    "LiveTensor",
    "MeasuredMemory",
    "MemoryReport",
    "Plan",
    "Request",
    "choose",
    "configure",
    "measure_training_memory",
    "peak_training_memory",
    "plan",
]
