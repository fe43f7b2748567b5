"""Networks that are left as they are, because conversion would save too little of their memory."""

import copy
import pickle
import time

import other_networks
import pytest
import torch
from convertible import assert_alike, make, step
from torch import nn

import effseg
from effseg.conversion.convert import Converted, Deferring
from effseg.conversion.lazy import LazyTensor


@pytest.fixture
def mednext():
    network, image = other_networks.make("mednext")
    return network, image


def test_a_network_that_does_not_pay_keeps_its_forward(mednext):
    network, image = mednext
    converted = effseg.convert(copy.deepcopy(network), shape=image.shape)
    report = converted.conversion_report
    assert report.left_alone
    assert report.kept.share == pytest.approx(0.96, abs=0.01)
    assert type(converted).forward is type(network).forward
    assert_alike(step(converted, image), step(network, image), 0.0)
    assert type(converted(image)) is torch.Tensor
    assert report.before == report.after
    assert (report.bytes_saved, report.peak_saved) == (0, 0)
    text = str(report)
    assert "left alone: converted it would keep 96% of what it saves for backward, more than 75%" in text
    assert "leave_alone=False" in text
    assert "saves nothing here" not in text


def test_it_is_converted_all_the_same_where_that_is_wanted(mednext):
    network, image = mednext
    converted = effseg.convert(copy.deepcopy(network), shape=image.shape, leave_alone=False)
    assert isinstance(converted, Deferring)
    assert not converted.conversion_report.left_alone
    assert isinstance(converted(image), LazyTensor)
    assert_alike(step(converted, image), step(network, image), 1e-9)


def test_a_network_that_pays_is_not_left_alone():
    report = effseg.convert(make("plain")[0]).conversion_report
    assert not report.left_alone
    assert report.kept.share < 0.5


def test_whether_it_pays_depends_on_what_runs_again():
    """Blocks that run again keep less."""
    network, image = other_networks.make("residual se 3d unet")
    found = {
        memory: effseg.convert(copy.deepcopy(network), memory=memory, shape=image.shape).conversion_report
        for memory in ("raw", "block")
    }
    assert {memory: report.left_alone for memory, report in found.items()} == {"raw": True, "block": False}


@pytest.mark.parametrize("memory", ["raw", "block", "stream", "auto"])
def test_a_network_left_alone_is_a_converted_one(memory, mednext):
    """In every mode: without lasts to find, and without a budget to keep."""
    network, image = mednext
    converted = effseg.convert(network, memory=memory, shape=image.shape)
    assert isinstance(converted, Converted)
    assert isinstance(converted, type(network))
    assert list(converted.state_dict()) == list(network.state_dict())
    assert all(a is b for a, b in zip(converted.parameters(), network.parameters(), strict=True))
    restored = effseg.restore(converted)
    assert type(restored) is type(network)
    for other in (restored, pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)):
        torch.testing.assert_close(other(image), network(image), rtol=0, atol=0)
    assert effseg.convert(converted, shape=image.shape).conversion_report.left_alone


def test_a_budget_is_never_left_alone(mednext):
    network, image = mednext
    converted = effseg.convert(network, memory="auto", memory_budget="1KB", shape=image.shape).train()
    assert not converted.conversion_report.left_alone
    with pytest.raises(effseg.InputError, match="the budget is"):
        converted(image)


def test_buffers_stay_shared_after_to():
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), *[nn.Tanh()] * 8)
    converted = effseg.convert(network)
    assert converted.conversion_report.left_alone
    converted.to(torch.float64)
    assert converted[1].running_mean is network[1].running_mean
    assert network[1].running_mean.dtype == torch.float64


def test_nothing_taken_over_is_still_refused():
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Tanh(), nn.Conv3d(2, 2, 3))
    with pytest.raises(effseg.InputError, match="strict=False returns it all the same"):
        effseg.convert(network)
    assert effseg.convert(network, strict=False).conversion_report.left_alone


def test_a_prediction_is_the_original_s(mednext):
    """Under autocast, too: a network left alone has no types of its own to follow."""
    network = mednext[0].float()
    converted = effseg.convert(network, shape=(1, 1, 16, 16, 16))
    for dtype in ("fp32", "bf16"):
        found, expected = (
            effseg.peak_training_memory(each, (1, 1, 16, 16, 16), dtype=dtype)
            for each in (converted, network)
        )
        assert found.peak == expected.peak


@pytest.mark.slow
def test_conversion_of_many_modules_is_quick():
    """Some 500 modules; two seconds of a processor that does nothing else."""
    unit = lambda: nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.LeakyReLU())  # noqa: E731
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), *[unit() for _ in range(124)])
    begun = time.process_time()
    effseg.convert(network)
    assert time.process_time() - begun < 20
