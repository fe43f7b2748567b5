"""Quick fake tensors against torch's own: the same predictions, field by field."""

import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import effseg
from effseg.memory import fakes, peak_training_memory, predict
from effseg.memory.fakes import QuickFakes
from effseg.models.effsegnet import EffSegNet
from effseg.models.unet3d import UNet3D


class Odd(nn.Module):
    """What C++ decides by devices: constants, tensors that are sent where they are, views, sums in place."""

    def __init__(self):
        super().__init__()
        self.convolve = nn.Conv3d(1, 4, 3, padding=1)
        self.norm = nn.InstanceNorm3d(4, affine=True)

    def forward(self, x):
        x = self.convolve(x.to(self.convolve.weight.device))
        x = self.norm(x) * torch.tensor(2.0) + torch.tensor([[1.0], [2.0], [3.0], [4.0]])[None, :, None, None]
        first, second = x.to(x.device, torch.float32).chunk(2, 1)
        x = torch.cat([first.exp().mul(3).add_(1), second.to("cpu", copy=False)], 1).permute(0, 1, 4, 3, 2)
        x = nn.functional.interpolate(x[..., ::2], scale_factor=(1, 1, 2), mode="trilinear")
        return x.transpose(2, 4).softmax(1).clone().mul_(torch.ones_like(x.transpose(2, 4)))


@pytest.fixture
def torchs_own(monkeypatch):
    def switch():
        monkeypatch.setattr(
            predict, "on_fakes", lambda work: work(FakeTensorMode(allow_non_fake_inputs=True))
        )

    return switch


def layers(*widths):
    for before, after in itertools.pairwise(widths):
        yield from (nn.Conv3d(before, after, 3, padding=1), nn.InstanceNorm3d(after, affine=True))
        yield nn.LeakyReLU(inplace=True)


def converted():
    network = nn.Sequential(*layers(1, 4, 4), nn.Conv3d(4, 3, 1))
    return effseg.convert(network, shape=(1, 1, 16, 16, 16), leave_alone=False)


class Wide(nn.Module):
    """A convolution of an even size, which stays torch's, of a float32 sum, which autocast rounds for it."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Sequential(*layers(1, 8)), nn.Conv3d(8, 8, 2, stride=2)
        self.up, self.head = nn.ConvTranspose3d(8, 8, 2, stride=2), nn.Conv3d(8, 3, 1)

    def forward(self, x):
        return self.head(self.up(self.down(self.first(x) + x.repeat(1, 8, 1, 1, 1))))


def converted_in_part():
    return effseg.convert(Wide(), shape=(1, 1, 16, 16, 16), leave_alone=False)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (Odd, "bf16"),
        (Odd, "fp32"),
        (converted, "bf16"),
        (converted_in_part, "bf16"),
        pytest.param(lambda: EffSegNet(1, 3, "small"), "bf16", marks=pytest.mark.slow),
        pytest.param(lambda: UNet3D(1, 3), "bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("small_preset")
def test_predictions_are_those_with_torchs_own_fakes(make, dtype, torchs_own):
    model = make()
    arguments = {"dtype": dtype, "optimizer": "sgd", "device": "cuda"}
    quick = peak_training_memory(model, (2, 1, 48, 16, 16), **arguments)
    torchs_own()
    assert quick == peak_training_memory(model, (2, 1, 48, 16, 16), **arguments)


def test_what_was_met_before_is_not_asked_again(monkeypatch):
    asked = []
    dispatch = FakeTensorMode.__torch_dispatch__

    def noted(self, func, *rest):
        asked.append(func)
        return dispatch(self, func, *rest)

    monkeypatch.setattr(FakeTensorMode, "__torch_dispatch__", noted)
    monkeypatch.setattr(fakes, "_known", {})
    with QuickFakes():
        x = torch.ones(3, 4)
        for _ in range(3):
            y = (x[1:] * 2).exp()
    assert y.shape == (2, 4)
    assert y.device == torch.device("cpu")
    assert len(asked) == len(set(asked))


def test_work_that_quick_fakes_cannot_do_is_done_with_torchs_own():
    def work(mode):
        if isinstance(mode, QuickFakes):
            raise RuntimeError("another device")
        return "done"

    assert fakes.on_fakes(work) == "done"
