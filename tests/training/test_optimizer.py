import math

import pytest
import torch
import torch.distributed as dist
from gloo_processes import in_processes
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


def make(model, world=WORLD, **values):
    config = TrainingConfig(data="d", output="r", learning_rate=0.1, weight_decay=0.0, warmup=0.0, **values)
    return Stepper(model, config, 100, world, {"batch_dice": True})


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


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm3d(1)

    def loss(self, image, labels, **options):
        return self.norm(image).square().sum()


OVERFLOWS = 1e25  # in the variance, which makes scale and gradient 0, and running statistics infinite


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("value", [math.nan, OVERFLOWS])
def test_a_skipped_step_leaves_no_trace_in_running_statistics(value):
    torch.manual_seed(0)
    model, state, image = Normed(), RunState(), torch.randn(1, 1, 2, 2, 2)
    stepper = make(model)
    stepper(0, image, None, state)
    before = copied(model)
    image[0, 0, 0, 0, 0] = value
    done = stepper(1, image, None, state)
    assert done.skipped
    assert math.isfinite(done.gradient_norm) == (value == OVERFLOWS)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (2, 1, 1)
    assert all(torch.equal(kept, before[name]) for name, kept in model.state_dict().items())
    image[0, 0, 0, 0, 0] = 3.0
    assert not stepper(2, image, None, state).skipped
    assert not any(torch.equal(new, before[name]) for name, new in model.state_dict().items())


def skip_in_one_of_two():
    """What two processes have after a step of which the second's running statistics overflow."""
    torch.manual_seed(0)
    world, model, state = World(dist.get_rank(), 2, torch.device("cpu")), Normed(), RunState()
    stepper, image = make(model, world), torch.randn(1, 1, 2, 2, 2)
    before = copied(model)
    if world.rank == 1:
        image[0, 0, 0, 0, 0] = OVERFLOWS
    stepper(0, image, None, state)
    return state.skipped, all(torch.equal(kept, before[name]) for name, kept in model.state_dict().items())


def test_processes_skip_together():
    assert in_processes(2, skip_in_one_of_two) == [(1, True), (1, True)]


def test_twenty_in_a_row_end_the_run():
    model, state = Model(), RunState()
    stepper = make(model)
    for number in range(19):
        step(stepper, state, number, math.nan)
    with pytest.raises(
        InputError, match=r"step 20: the gradient or running statistics were .* 20 times in a row"
    ):
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
