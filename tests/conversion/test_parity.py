"""A converted network's outputs, gradients and running statistics are the original's."""

import copy

import other_networks
import pytest
import torch
from convertible import A_FEW, FEW, NETWORKS, assert_alike, listed, make, step
from tolerances import assert_as_rounded, joined, rounding_noise
from torch import nn

import effseg


@pytest.mark.parametrize(
    ("name", "memory"),
    [(name, "block") for name in NETWORKS]
    + [pytest.param(name, "raw", marks=[pytest.mark.slow] * (name not in FEW)) for name in NETWORKS],
)
def test_a_step_in_float64(name, memory):
    network, image = make(name)
    converted = effseg.convert(copy.deepcopy(network), memory=memory)
    assert_alike(step(converted, image), step(network, image), 1e-9)


LARGE = ("vnet", "swin unetr")


@pytest.mark.diagonal
@pytest.mark.parametrize("memory", ["raw", "block"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in other_networks.NETWORKS]
)
def test_a_step_of_more_families(name, memory):
    network, image = other_networks.make(name)
    converted = effseg.convert(copy.deepcopy(network), memory=memory, shape=image.shape, leave_alone=False)
    found = []
    for each in (converted, network):
        torch.manual_seed(1)
        found.append(step(each, image))
    assert_alike(*found, 1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "plain deep",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("residual", "basic", "dynunet", "segresnet")),
    ],
)
def test_a_step_in_float32(name):
    network, image = make(name, torch.float32)
    converted = effseg.convert(copy.deepcopy(network))
    wide = copy.deepcopy(network).double()

    def joined_step(network, image):
        """All gradients together: a sign that flips at a leaky ReLU's kink may move one of them far."""
        outputs, grads, _ = step(network, image)
        return {"outputs": joined(outputs), "gradients": joined(grads)}

    exact = joined_step(wide, image.double())
    noise = rounding_noise(lambda: joined_step(wide, image.double()), exact)
    assert_as_rounded(joined_step(converted, image), exact, noise)


@pytest.mark.parametrize("name", A_FEW)
def test_evaluation(name):
    """Running statistics, no deep supervision of MONAI's; real tensors come out."""
    network, image = make(name)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    converted = effseg.convert(copy.deepcopy(network).eval())
    with torch.no_grad():
        for a, b in zip(listed(converted(image)), listed(network.eval()(image)), strict=True):
            assert type(a) is torch.Tensor
            assert (a - b).norm() <= 1e-9 * b.norm()


def test_fine_tuning_with_frozen_statistics():
    """Batch norm in evaluation mode inside a network that trains."""
    network, image = make("plain batch")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.uniform_(-1, 1)
            module.eval()
    converted = effseg.convert(copy.deepcopy(network))
    assert_alike(step(converted, image), step(network, image), 1e-9)


@pytest.mark.parametrize("memory", ["raw", "block"])
def test_dropout_draws_the_same_numbers(memory):
    from convertible import plain

    torch.manual_seed(0)
    network, image = plain(dropout=0.3).double(), torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)
    converted = effseg.convert(copy.deepcopy(network), memory=memory)
    found = []
    for each in (converted, network):
        torch.manual_seed(1)
        found.append(step(each, image))
    assert_alike(*found, 1e-9)
    left = {what for module in converted.conversion_report.left for what in module.left}
    assert any("dropout" in what for what in left)


@pytest.mark.parametrize("memory", ["raw", "block"])
def test_a_second_step_and_frozen_layers(memory):
    """Parameters without gradient, and twice the same with gradients added up."""
    network, image = make("residual")
    for parameter in list(network.encoder.parameters())[:12]:
        parameter.requires_grad_(False)
    converted = effseg.convert(copy.deepcopy(network), memory=memory)
    assert_alike(step(converted, image), step(network, image), 1e-9)
    assert_alike(step(converted, image), step(network, image), 1e-9)


@pytest.mark.parametrize("memory", ["raw", "block"])
def test_two_steps_give_the_same_bits(memory):
    network, image = make("residual", torch.float32)
    converted = effseg.convert(network, memory=memory)
    first, second = step(converted, image), step(converted, image)
    for a, b in zip(first[1], second[1], strict=True):
        assert a is None or torch.equal(a, b)


def test_autocast_computes_in_bfloat16():
    network, image = make("plain", torch.float32)
    converted = effseg.convert(copy.deepcopy(network))
    with torch.autocast("cpu", torch.bfloat16):
        output = converted(image)
        assert output.dtype == torch.bfloat16
        theirs = network(image).float()
    exact = copy.deepcopy(network).double()(image.double())
    error, of_torch = ((t.double() - exact).norm() for t in (output.float(), theirs))
    assert error <= 2 * of_torch
