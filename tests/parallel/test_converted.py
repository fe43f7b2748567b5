"""Converted networks whose volume processes share: values, gradients, and what is refused."""

import copy
import threading

import pytest
import torch
from convertible import basic, plain, residual, segresnet
from thread_ranks import in_ranks
from torch import nn

import effseg
from effseg.errors import InputError
from effseg.parallel.partition import entered

TOLERANCE = 1e-9
NETWORKS = {
    "PlainConvUNet": (lambda: plain(deep=True), (20, 16, 12)),
    "ResEnc": (residual, (20, 16, 12)),
    "BasicUNet": (basic, (38, 33, 35)),  # odd on coarser grids, which it pads
    "SegResNet": (segresnet, (20, 16, 12)),
}


def converted(network, memory):
    with entered(None):
        return effseg.convert(network, memory=memory, strict=False, leave_alone=False).train()


def step(network, image, labels):
    """The loss, gradients, and a segmentation's logits."""
    loss = effseg.SegmentationLoss(label_smoothing=0.1)(network(image), labels)
    loss.backward()
    with torch.no_grad():
        logits = network.eval()(image)
    logits = logits[0] if isinstance(logits, list) else logits
    return loss.item(), [p.grad for p in network.parameters()], logits


def compare(make, shape, memory, size):
    torch.manual_seed(0)
    network, lock = make().double(), threading.Lock()
    image = torch.randn(1, 1, *shape, dtype=torch.float64)
    labels = torch.randint(0, 3, (1, *shape))
    loss, gradients, logits = step(converted(copy.deepcopy(network), memory), image, labels)

    def own(split):
        with lock:
            mine = converted(copy.deepcopy(network), memory)
        rows = slice(*split.rows(shape[0]))
        return step(mine, image[:, :, rows], labels[:, rows])

    found = in_ranks(size, own)
    assert max(abs(one[0] - loss) for one in found) <= TOLERANCE
    assert (torch.cat([one[2] for one in found], 2) - logits).abs().max() <= TOLERANCE
    for i, wanted in enumerate(gradients):
        if wanted is not None:
            mean = sum(one[1][i] for one in found) / size
            assert (mean - wanted).abs().max() <= TOLERANCE * max(float(wanted.abs().max()), 1e-3)


def test_a_converted_network_is_that_of_one_process():
    compare(*NETWORKS["PlainConvUNet"], "block", 2)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["raw", "block"])
@pytest.mark.parametrize("name", NETWORKS)
def test_converted_networks_are_those_of_one_process(name, memory):
    compare(*NETWORKS[name], memory, 3)


class Odd(nn.Sequential):
    """With an operator that looks across rows in its own way."""

    def __init__(self):
        super().__init__(
            nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.AvgPool3d(3, 1, 1), nn.Conv3d(4, 3, 1)
        )


def test_an_operator_that_cannot_be_split_is_named():
    def own(split):
        converted(Odd(), "raw")(torch.zeros(1, 1, 4, 4, 4))

    with pytest.raises(InputError, match=r"operator torch\.\S*avg_pool3d"):
        in_ranks(2, own)


def test_a_network_that_was_left_alone_is_refused():
    def own(split):
        with entered(None):
            network = effseg.convert(Odd()).train()
        assert network.conversion_report.left_alone
        network(torch.zeros(1, 1, 4, 4, 4))

    with pytest.raises(InputError, match="leave_alone=False converts it"):
        in_ranks(2, own)


def test_modes_that_cannot_be_split_are_refused():
    def own(split):
        converted(segresnet(), "stream")(torch.zeros(1, 1, 4, 4, 4))

    with pytest.raises(InputError, match="memory: expected raw or block"):
        in_ranks(2, own)


def test_stored_logits_are_refused():
    def own(split):
        labels = torch.zeros(1, 4, 4, 4, dtype=torch.long)
        effseg.losses.dice_cross_entropy(torch.zeros(1, 2, 4, 4, 4), labels)

    with pytest.raises(InputError, match="logits: expected lazy ones"):
        in_ranks(2, own)
