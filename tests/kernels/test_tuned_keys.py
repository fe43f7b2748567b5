"""What is measured is what networks look up: keys of the tuner, of the benchmark and of launches agree."""

from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import effseg
from effseg.benchmarking.registry import Workload

pytest.importorskip("triton")

from effseg.benchmarking import operators
from effseg.common.device import pretending
from effseg.expressions.slabs import abridged
from effseg.kernels import choose, config, tuned
from effseg.kernels.config import ATEN, Config, Problem
from effseg.kernels.launch import recording
from effseg.kernels.tuned import key
from effseg.models.effsegnet import EffSegNet
from effseg.models.levels import PRESETS, Architecture
from effseg.tuning import autotune


class Spy(tuned.Tuned):
    """A tuned file in which every convolution is left to ATen, or which is empty; it notes what is sought."""

    def __init__(self, aten: bool) -> None:
        super().__init__()
        self.aten = aten
        self.sought: set[str] = set()

    def _find(self, problem: Problem) -> Config | None:
        # The gradient of an image is asked for, to know whether a convolution is fused, and never run.
        if problem.op != "conv3d_dgrad" or problem.in_channels > 1:
            self.sought.add(key(problem))
        return Config(ATEN) if self.aten and problem.op.startswith("conv3d") else None


def sought(model: str, workload: Workload, memory: str, aten: bool, monkeypatch) -> set[str]:
    """The keys that a training step and a segmentation look up as they choose configurations."""
    spy = Spy(aten)
    with monkeypatch.context() as patch:
        patch.setattr(choose, "tuned_files", lambda gpu: (Path("spy"),))
        patch.setattr(choose, "read_tuned", lambda path: spy)
        low = torch.autocast("cpu", torch.bfloat16)
        kernels = (effseg.algorithm("triton"), recording("sm_90"), pretending("cuda"))
        with FakeTensorMode(), ExitStack() as stack:
            for context in (*kernels, abridged(), low):
                stack.enter_context(context)
            network = autotune.build_model(model, 1, workload.classes)
            network = type(network)(**(network.arguments | {"memory": memory}))
            image = torch.empty(1, 1, *workload.volume)
            network.loss(image, torch.empty(1, *workload.volume, dtype=torch.uint8)).backward()
            network.segment(image)
    return spy.sought


def all_sought(model: str, workload: Workload, monkeypatch) -> set[str]:
    runs = product(("raw", "stream"), (False, True))
    return set().union(*(sought(model, workload, *run, monkeypatch) for run in runs))


def test_the_tuner_measures_what_launches_look_up(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", Architecture((16, 32), (0, 1)))
    monkeypatch.setattr(autotune, "build_model", lambda name, *sizes: EffSegNet(*sizes, preset="small"))
    workload = Workload((16, 32, 48), classes=5)
    tuned = autotune.problems("small", workload.volume, ["bf16"], workload.classes, "sm_90")
    assert {key(problem) for problem in tuned} == all_sought("small", workload, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("volume", [(256, 512, 512), (32, 48, 64)])
def test_tuner_and_benchmark_measure_what_launches_of_base_look_up(volume, monkeypatch):
    workload = Workload(volume)
    looked_up = all_sought(operators.MODEL, workload, monkeypatch)
    tuned = autotune.problems(operators.MODEL, volume, ["bf16"], workload.classes, "sm_90")
    assert {key(problem) for problem in tuned} == looked_up
    with recording("sm_90"):
        timed = {key(problem) for problem in operators.problems(workload, "bf16", torch.device("cpu"))}
    assert timed < looked_up
    assert {name.split()[0] for name in timed} == set(config.LOOPS)
