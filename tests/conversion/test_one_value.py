"""Norms whose statistics are of one value."""

import copy

import pytest
import torch
from convertible import assert_alike, step
from torch import nn

import effseg

NORMS = {
    "batch": nn.BatchNorm3d(4),
    "instance": nn.InstanceNorm3d(4, affine=True),
    "instance, running": nn.InstanceNorm3d(4, track_running_stats=True),
    "group": nn.GroupNorm(4, 4),
}


def network_of(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv3d(4, 3, 1)).double()


def converted_of(network, memory):
    return effseg.convert(copy.deepcopy(network), memory=memory, shape=(1, 1, 4, 4, 4), leave_alone=False)


@pytest.mark.parametrize("memory", ["raw", "block", "stream"])
@pytest.mark.parametrize("norm", NORMS)
def test_what_torch_refuses_is_refused(norm, memory):
    network, image = network_of(copy.deepcopy(NORMS[norm])), torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    converted = converted_of(network, memory)
    for each in (network, converted):
        with pytest.raises(ValueError, match=r"xpected more than (1 value|1 spatial element|one voxel)"):
            step(each, image)
    for name, value in converted.named_buffers():
        assert torch.equal(value, network.get_buffer(name)), name
    if norm in ("batch", "group"):
        two = torch.randn(2, 1, 1, 1, 1, dtype=torch.float64)
        assert_alike(step(converted, two), step(network, two), 1e-9)
    if norm in ("batch", "instance, running"):
        torch.testing.assert_close(converted.eval()(image), network.eval()(image), rtol=1e-9, atol=1e-9)


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 3, 1)
        self.terms = nn.ParameterList(torch.randn(4) for _ in range(2))

    def forward(self, image):
        x = torch.instance_norm(self.first(image), *self.terms, None, None, True, 0.1, 1e-5, True)
        return self.head(torch.group_norm(x, 4, *self.terms, 1e-5, True))


def test_what_torch_takes_is_taken():
    network, image = Direct().double(), torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    assert_alike(step(converted_of(network, "raw"), image), step(network, image), 1e-9)
