"""The fused loss is nnU-Net's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

import effseg
from effseg.nnunet.loss import FusedLoss, fused

CLASSES = 4


def nnunets(ignore=None, batch_dice=False, weights=None):
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    one = DC_and_CE_loss(dice, {}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    return one if weights is None else DeepSupervisionWrapper(one, weights)


def sample(size, ignore=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn((2, CLASSES, *size), generator=draw).requires_grad_()
    labels = torch.randint(0, CLASSES + ignore, (2, 1, *size), generator=draw, dtype=torch.int16)
    return logits, labels


def value_and_gradients(loss, outputs, targets):
    tensors = outputs if isinstance(outputs, list) else [outputs]
    value = loss(outputs, targets)
    return value.detach(), torch.autograd.grad(value, tensors, allow_unused=True)


def assert_same(loss, outputs, targets):
    ours, own = (value_and_gradients(x, outputs, targets) for x in (fused(loss), loss))
    assert isinstance(fused(loss), FusedLoss)
    torch.testing.assert_close(ours[0], own[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(ours[1], own[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("ignore", [None, CLASSES])
def test_value_and_gradient(ignore, batch_dice):
    logits, labels = sample((5, 6, 7), ignore is not None)
    assert_same(nnunets(ignore, batch_dice), logits, labels)


def test_deep_supervision():
    outputs, targets = (list(x) for x in zip(*map(sample, ((8, 8, 8), (4, 4, 4), (2, 2, 2))), strict=True))
    assert_same(nnunets(weights=(2 / 3, 1 / 3, 0)), outputs, targets)


def test_a_patch_without_annotation():
    """Sparse labels: nnU-Net leaves the cross-entropy out."""
    logits, labels = sample((4, 4, 4))
    nothing = torch.full_like(labels, CLASSES)
    assert_same(nnunets(CLASSES), logits, nothing)
    value, (gradient,) = value_and_gradients(fused(nnunets(CLASSES)), logits, nothing)
    assert value == -1  # nnU-Net's loss of a patch without a mistake
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.filterwarnings("ignore:size_average")  # nnU-Net's top-k
def test_other_losses_stay():
    dice = {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": False}
    regions = DC_and_BCE_loss({}, dice, dice_class=MemoryEfficientSoftDiceLoss)
    topk = DC_and_topk_loss(dice, {"k": 10})
    weighted = nnunets()
    weighted.ce.weight = torch.ones(CLASSES)
    for loss in (regions, topk, weighted, DeepSupervisionWrapper(regions, (1, 0))):
        assert fused(loss) is loss


def test_lazy_logits_and_those_of_the_network_as_it_is():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.InstanceNorm3d(8, affine=True),
        nn.LeakyReLU(),
        nn.Conv3d(8, CLASSES, 1),
    )
    image, (_, labels) = torch.randn(2, 1, 6, 7, 8), sample((6, 7, 8), ignore=True)
    loss, results = nnunets(CLASSES), []
    for model, criterion in ((network, loss), (effseg.convert(network, memory="raw"), fused(loss))):
        value = criterion(model.train()(image), labels)
        results.append((value.detach(), torch.autograd.grad(value, list(network.parameters()))))
    (own, own_gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    for a, b in zip(our_gradients, own_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_two_processes():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = str(Path(__file__).with_name("ddp_run.py"))
    done = subprocess.run([*torchrun, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("off")]
    assert len(found) == 2
    assert max(found) < 1e-5
