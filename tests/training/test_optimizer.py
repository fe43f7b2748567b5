import math

import pytest
import torch
from torch import nn

from effseg.errors import InputError
from effseg.training import TrainingConfig
from effseg.training.distributed import World
from effseg.training.optimizer import Stepper, uses_bf16
from effseg.training.state import RunState

WORLD = World(0, 1, torch.device("cpu"))


class Model(nn.Module):
    """Loss weight * image.sum(): the gradient is the image's sum."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.options = {}

    def loss(self, image, labels, **options):
        self.options = options
        return (self.weight * image).sum()


def make(model, **values):
    config = TrainingConfig(data="d", output="r", learning_rate=0.1, weight_decay=0.0, warmup=0.0, **values)
    return Stepper(model, config, 100, WORLD, {"batch_dice": True})


def step(stepper, state, number, value):
    return stepper(number, torch.tensor([value]), torch.zeros(1, dtype=torch.uint8), state)


def test_steps_clips_and_hands_the_options_on():
    model, state = Model(), RunState()
    stepper = make(model, clip_norm=5.0)
    done = step(stepper, state, 0, 40.0)
    assert (done.loss, done.gradient_norm, done.learning_rate) == (40.0, 40.0, 0.1)
    assert model.weight.item() == pytest.approx(0.9, abs=1e-6)
    assert stepper.optimizer.state[model.weight]["exp_avg"].item() == pytest.approx(0.1 * 5.0, rel=1e-5)
    assert model.weight.grad is None
    assert model.options == {"batch_dice": True, "process_group": None}
    assert state.step == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(value):
    model, state = Model(), RunState()
    stepper = make(model)
    step(stepper, state, 0, value)
    assert model.weight.item() == 1.0
    assert (state.step, state.skipped, state.skipped_in_a_row) == (1, 1, 1)
    step(stepper, state, 1, 1.0)
    assert model.weight.item() < 1.0
    assert (state.step, state.skipped, state.skipped_in_a_row) == (2, 1, 0)


def test_twenty_in_a_row_end_the_run():
    model, state = Model(), RunState()
    stepper = make(model)
    for number in range(19):
        step(stepper, state, number, math.nan)
    with pytest.raises(InputError, match="step 20: the gradient was not finite 20 times in a row"):
        step(stepper, state, 19, math.nan)


def test_autocast_is_for_gpus_unless_asked_for():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    config = TrainingConfig(data="d", output="r")
    assert [uses_bf16(config, device) for device in (cpu, cuda)] == [False, True]
    assert uses_bf16(config.replace(dtype="bf16"), cpu)
    assert not uses_bf16(config.replace(dtype="fp32"), cuda)


def test_computes_under_autocast():
    model, state = Model(), RunState()
    seen = []
    model.loss = lambda image, labels, **options: (
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None),
        model.weight * image.sum(),
    )[1]
    for dtype in ("fp32", "bf16"):
        step(make(model, dtype=dtype), state, 0, 1.0)
    assert seen == [None, torch.bfloat16]
