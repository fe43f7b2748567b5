"""Does a training step fit a GPU, how, and what is the largest volume that does: `effseg plan`."""

from effseg.planning.planner import Plan, Request, choose, plan

__all__ = ["Plan", "Request", "choose", "plan"]
