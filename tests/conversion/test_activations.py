"""What follows a normalisation or a sum, and logits that no 1x1x1 convolution makes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from convertible import assert_alike, step
from torch import nn

import effseg
from effseg.losses import OWN_LOSS, dice_cross_entropy


class Activated(nn.Module):
    """Two layers with one kind of activation, their sum, activated, and logits of a 3x3x3 convolution."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Conv3d(i, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), activation())
            for i in (1, 4)
        )
        self.after, self.head = activation(), nn.Conv3d(8, 3, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        return self.head(torch.cat((self.after(self.second(x) + x), x), 1))


KINDS = {
    "elu": lambda: nn.ELU(0.8),
    "elu, in place": lambda: nn.ELU(inplace=True),
    "silu, in place": lambda: nn.SiLU(inplace=True),
    "gelu": lambda: nn.GELU("tanh"),
    "prelu": nn.PReLU,
    "prelu of channels": lambda: nn.PReLU(4),
}


def network(kind):
    torch.manual_seed(0)
    return Activated(KINDS[kind]).double(), torch.randn(2, 1, 9, 8, 7, dtype=torch.float64)


@pytest.mark.parametrize("memory", ["raw", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, memory):
    original, image = network(kind)
    converted = effseg.convert(copy.deepcopy(original), memory=memory, shape=image.shape)
    assert not converted.conversion_report.left
    assert_alike(step(converted, image), step(original, image), 1e-9)


@pytest.mark.parametrize("options", [{}, {"ignore_index": 2, "label_smoothing": 0.1, "batch_dice": True}])
def test_loss_of_stored_logits(options):
    """Slab by slab, with the numbers of torch's."""
    original, image = network("prelu")
    labels = torch.randint(0, 3, (2, 9, 8, 7))
    found = []
    for each in (effseg.convert(original, shape=image.shape), original):
        each.zero_grad()
        logits = each(image)
        assert hasattr(logits, OWN_LOSS) == (each is not original)
        loss = dice_cross_entropy(logits, labels, **options)
        loss.backward()
        found.append(([loss.detach()], [p.grad.clone() for p in each.parameters()], []))
    assert_alike(*found, 1e-9)


def test_other_outputs_are_torchs_own():
    original, image = network("elu")
    converted = effseg.convert(original, shape=image.shape, lazy_logits=False)
    assert not hasattr(converted(image), OWN_LOSS)
    assert not hasattr(effseg.convert(original, shape=image.shape).eval()(image), OWN_LOSS)


def test_types_under_autocast_are_those_of_torch():
    """A sum and a concatenation of bf16 and fp32 give fp32, of which a convolution reads bf16."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.ELU())
            self.last = nn.Conv3d(8, 2, 3, padding=1)

        def forward(self, x):
            y = self.layer(x)
            wide = y + x.repeat(1, 4, 1, 1, 1)
            both = torch.cat((y, F.elu(wide)), 1)
            return self.last(both), wide.dtype, both.dtype

    torch.manual_seed(0)
    original, image = Mixed(), torch.randn(1, 1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        (ours, *types), (theirs, *expected) = (
            each(image) for each in (effseg.convert(original, shape=image.shape), original)
        )
    assert types == expected
    torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)  # a few roundings of 2 ** -8
