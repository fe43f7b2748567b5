"""What is measured is what networks look up: keys of the tuner, of the benchmark and of launches agree."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import effseg
from effseg.benchmarking.registry import Workload

pytest.importorskip("triton")

from effseg.benchmarking import operators
from effseg.kernels import config
from effseg.kernels.config import ATEN, INTERPRETER, Config, Problem, key
from effseg.models import build_model
from effseg.slabs import abridged

WORKLOAD = Workload((32, 48, 64), classes=5)


class Spy(config.Tuned):
    """A tuned file in which every convolution is left to ATen, or which is empty; it notes what is sought."""

    def __init__(self, aten: bool) -> None:
        super().__init__()
        self.aten, self.sought = aten, set()

    def _find(self, problem: Problem) -> Config | None:
        # The gradient of an image is asked for, to know whether a convolution is fused, and never run.
        if problem.op != "conv3d_dgrad" or problem.in_channels > 1:
            self.sought.add(key(problem))
        return Config(ATEN) if self.aten and problem.op.startswith("conv3d") else None


def sought(memory: str, aten: bool, monkeypatch) -> set[str]:
    """The keys that a training step and a segmentation of EffSegNet base look up."""
    spy = Spy(aten)
    with monkeypatch.context() as patch:
        patch.setattr(config, "tuned_files", lambda gpu: (Path("spy"),))
        patch.setattr(config, "read_tuned", lambda path: spy)
        # Else no file is looked into.
        patch.setattr(config, "INTERPRETER", "none")
        low = torch.autocast("cpu", torch.bfloat16)
        with FakeTensorMode(), effseg.algorithm("triton"), abridged(), low:
            network = build_model("effseg-base", 1, WORKLOAD.classes)
            network = type(network)(**(network.arguments | {"memory": memory}))
            image = torch.empty(1, 1, *WORKLOAD.volume)
            network.loss(image, torch.empty(1, *WORKLOAD.volume, dtype=torch.uint8)).backward()
            network.segment(image)
    return spy.sought


def test_keys_of_tuner_benchmark_and_launches_are_the_same(monkeypatch):
    looked_up = set()
    for memory in ("raw", "stream"):
        for aten in (False, True):
            looked_up |= sought(memory, aten, monkeypatch)
    tuned = {key(problem) for problem in operators._asked(WORKLOAD, "bf16", INTERPRETER)}
    assert tuned == looked_up
    timed = {key(problem) for problem in operators.problems(WORKLOAD, "bf16", torch.device("cpu"))}
    assert timed < looked_up
    assert {name.split()[0] for name in timed} == set(config.LOOPS) - {"channel_sums"}
