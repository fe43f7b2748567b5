"""Torch's functions in a converted network, called directly with arguments in any of torch's ways."""

import copy

import pytest
import torch
import torch.nn.functional as F
from convertible import assert_alike, step
from torch import nn

import effseg


class Network(nn.Module):
    """A call between layers."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.first, self.second = (nn.Conv3d(i, 8, 3, padding=1) for i in (1, 8))
        self.norm, self.other, self.given = (nn.BatchNorm3d(8) for _ in range(3))
        self.weight, self.upward = (
            nn.Parameter(torch.randn(8, 8, 3, 1, 1)),
            nn.Parameter(torch.randn(8, 8, 2, 1, 2)),
        )
        self.last = nn.LazyConv3d(3, 1)

    def forward(self, image):
        x = F.leaky_relu(self.norm(self.first(image)))
        return self.last(self.call(self, x, self.other(self.second(x))))


def in_torchs_order(net):
    """Arguments of a norm of torch itself; functional's have running statistics first."""
    given = net.given
    return given.weight, given.bias, given.running_mean, given.running_var


def in_functionals_order(net):
    weight, bias, mean, var = in_torchs_order(net)
    return mean, var, weight, bias


BY_POSITION = {
    "torch.batch_norm": lambda net, x, y: torch.batch_norm(x, *in_torchs_order(net), True, 0.2, 1e-3, False),
    "torch.batch_norm, running": lambda net, x, y: torch.batch_norm(
        x, *in_torchs_order(net), False, 0.2, 1e-3, False
    ),
    "F.batch_norm": lambda net, x, y: F.batch_norm(x, *in_functionals_order(net), True, 0.2, 1e-3),
    "torch.instance_norm": lambda net, x, y: torch.instance_norm(
        x, *in_torchs_order(net), True, 0.2, 1e-3, False
    ),
    "F.instance_norm": lambda net, x, y: F.instance_norm(x, *in_functionals_order(net), True, 0.2, 1e-3),
    "torch.group_norm": lambda net, x, y: torch.group_norm(
        x, 2, net.given.weight, net.given.bias, 1e-3, False
    ),
    "F.group_norm": lambda net, x, y: F.group_norm(x, 2, net.given.weight, net.given.bias, 1e-3),
    "conv3d": lambda net, x, y: F.conv3d(x, net.weight, net.given.bias, (2, 1, 1), (1, 0, 0), (1, 1, 1), 1),
    "conv_transpose3d": lambda net, x, y: F.conv_transpose3d(
        x, net.upward, net.given.bias, (2, 1, 2), 0, 0, 1, 1
    ),
    "torch.max_pool3d": lambda net, x, y: torch.max_pool3d(x, (2, 1, 2), (2, 1, 2), 0, 1, True),
    "F.max_pool3d": lambda net, x, y: F.max_pool3d(x, (2, 1, 2), (2, 1, 2), 0, 1, True, False),
    "F.avg_pool3d": lambda net, x, y: F.avg_pool3d(x, (2, 1, 2), (2, 1, 2), 0, False, True, None),
    "F.interpolate": lambda net, x, y: F.interpolate(
        net.second(x), None, 2, "trilinear", False, False, False
    ),
    "F.leaky_relu": lambda net, x, y: F.leaky_relu(y, 0.2, True),
    "F.relu": lambda net, x, y: F.relu(y, True),
    "F.elu": lambda net, x, y: F.elu(y, 0.5, True),
    "F.silu": lambda net, x, y: F.silu(y, True),
    "torch.prelu": lambda net, x, y: torch.prelu(y, net.given.weight),
    "F.pad": lambda net, x, y: F.pad(x, (0, 0, 0, 0, 0, 0), "constant", 1.0) + y,
    "F.dropout3d": lambda net, x, y: F.dropout3d(y, 0.5, False, True) + x,
    "torch.cat": lambda net, x, y: torch.cat((x, y), 1),
    "torch.concatenate": lambda net, x, y: torch.concatenate((x, y), -4),
}


BY_NAME = {
    "torch.cat, axis": lambda net, x, y: torch.cat((x, y), axis=1),
    "torch.concat, axis": lambda net, x, y: torch.concat(tensors=(x, y), axis=-4),
    "torch.concatenate, axis": lambda net, x, y: torch.concatenate((x, y), axis=1),
    "torch.cat, voxels": lambda net, x, y: torch.cat((x, y), axis=2),
    "torch.add": lambda net, x, y: torch.add(x1=x, x2=y),
    "Tensor.add": lambda net, x, y: x.add(x2=y),
    "torch.add of old": lambda net, x, y: torch.add(x, 2, y),
    "torch.relu": lambda net, x, y: torch.relu(x=y),
    "torch.relu_": lambda net, x, y: after(torch.relu_(x=y), y),
    "F.relu": lambda net, x, y: after(F.relu(input=y, inplace=True), y),
    "F.relu of what others read": lambda net, x, y: changed_after_reading(x * 2, y, F.relu, "input"),
    "torch.relu_ of what others read": lambda net, x, y: changed_after_reading(x * 2, y, torch.relu_, "x"),
    "torch.conv3d": lambda net, x, y: torch.conv3d(x=x, weight=net.weight, padding=(1, 0, 0)),
    "torch.batch_norm": lambda net, x, y: torch.batch_norm(
        x, running_mean=None, running_var=None, training=True, momentum=0.1, eps=1e-5, cudnn_enabled=True,
        bias=net.given.bias, weight=net.given.weight,
    ),
    "F.batch_norm": lambda net, x, y: F.batch_norm(
        input=x, running_var=None, running_mean=None, training=True
    ),
    "F.max_pool3d": lambda net, x, y: F.max_pool3d(input=x, kernel_size=(2, 1, 2)),
}  # fmt: skip


def after(_, found):
    return found


def changed_after_reading(x, y, change, name):
    both = torch.cat((x, y), 1)
    change(**{name: x}, **({"inplace": True} if change is F.relu else {}))
    return torch.cat((both, x), 1)


def check(call):
    torch.manual_seed(0)
    network, image = Network(call).double(), torch.randn(2, 1, 4, 5, 6, dtype=torch.float64)
    network(image)  # of as many channels as the call gives
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    found = step(effseg.convert(copy.deepcopy(network), leave_alone=False, strict=False), image)
    assert_alike(found, step(network, image), 1e-9)


@pytest.mark.parametrize("name", BY_POSITION)
def test_arguments_by_position(name):
    check(BY_POSITION[name])


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.filterwarnings("ignore:This overload of add")
def test_arguments_by_name(name):
    """Torch's own, or numpy's."""
    check(BY_NAME[name])
