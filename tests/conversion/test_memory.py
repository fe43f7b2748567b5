"""What conversion is for."""

import sys

import pytest
import torch
from convertible import make, plain

import effseg
from effseg.benchmarking import networks
from effseg.memory import measure_training_memory

NNUNET = "dynamic_network_architectures"


def bytes_per_voxel(make, memory, dtype, shape=(1, 1, 512, 512, 256)):
    network = effseg.convert(make(15), memory=memory) if memory else make(15)
    return effseg.peak_training_memory(network, shape, dtype=dtype).bytes_per_voxel


NETS = "monai.networks.nets"
CASES = {
    ("plain_conv_unet", "fp32"): (0.40, 0.30),
    ("plain_conv_unet", "bf16"): (0.40, 0.30),
    ("residual_encoder_unet", "bf16"): (0.45, 0.33),
    ("dynunet", "bf16"): (0.40, 0.30),
    ("basic_unet", "bf16"): (0.35, 0.28),
    ("segresnet", "bf16"): (0.23, 0.17),
    ("BasicUNetPlusPlus", "bf16"): (0.35, 0.27),
    ("UNet", "bf16"): (0.45, 0.42),
    ("AttentionUnet", "bf16"): (0.60, 0.55),
    ("VNet", "bf16"): (0.65, 0.60),
}
"""What remains of a step's peak at most, "raw" and "block"."""
ORIGINAL = {("plain_conv_unet", "fp32"): 2231, ("plain_conv_unet", "bf16"): 1126}
WIDTHS = {"channels": (32, 64, 128, 256, 320), "strides": (2, 2, 2, 2)}
OPTIONS = {"UNet": WIDTHS | {"num_res_units": 2}, "AttentionUnet": WIDTHS}


@pytest.mark.slow
@pytest.mark.parametrize(("network", "dtype"), CASES)
def test_predicted_peak_of_a_step(network, dtype):
    make = getattr(networks, network, None)
    of_nnunet = network in ("plain_conv_unet", "residual_encoder_unet")
    package = pytest.importorskip(NNUNET if of_nnunet else NETS)
    if make is None:
        make = lambda classes: getattr(package, network)(3, 1, classes, **OPTIONS.get(network, {}))  # noqa: E731
    stock = bytes_per_voxel(make, None, dtype)
    assert stock == pytest.approx(ORIGINAL.get((network, dtype), stock), rel=0.02)
    for memory, bar in zip(("raw", "block"), CASES[network, dtype], strict=True):
        assert bytes_per_voxel(make, memory, dtype) <= bar * stock


@pytest.mark.parametrize("memory", ["raw", pytest.param("block", marks=pytest.mark.slow)])
def test_prediction_equals_the_measured_step(memory):
    """But for scratch inside the CPU's batch norm, which is as large as a slab: here much of the volume."""
    pytest.importorskip(NNUNET)
    build = lambda: effseg.convert(plain(), memory=memory)  # noqa: E731
    shape = (1, 1, 64, 48, 48)
    predicted = effseg.peak_training_memory(build(), shape, dtype="fp32")
    measured = measure_training_memory(build, shape, 3, dtype="fp32")
    assert predicted.peak == pytest.approx(measured.outside_convolutions, rel=0.08)


class Any(torch.nn.Module):
    """Two images in, a dictionary of one class and of a number out."""

    def __init__(self):
        super().__init__()
        conv, norm = torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.InstanceNorm3d(4)
        self.body, self.head = torch.nn.Sequential(conv, norm, torch.nn.ReLU()), torch.nn.Conv3d(4, 1, 1)

    def forward(self, image, other):
        features = self.body(image) + other["image"]
        return {"mask": self.head(features), "size": features.mean()}


def test_auto_takes_any_inputs_and_outputs():
    converted = effseg.convert(Any(), memory="auto", memory_budget="1GB", strict=False)
    image = torch.randn(1, 1, 6, 6, 6)
    found = converted(image, other={"image": image.square()})
    (found["mask"].square().mean() + found["size"]).backward()
    assert list(converted.effseg_choices.values()) == ["raw"]


@pytest.mark.slow
def test_auto_takes_what_fits_for_every_size(monkeypatch):
    network, image = make("plain", torch.float32)
    peaks = {}

    def predicted_once(model, shape, dtype, device):
        memory = model.effseg_settings.memory
        if memory not in peaks:
            peaks[memory] = effseg.peak_training_memory(model, shape, dtype=dtype, device=device)
        return peaks[memory]

    monkeypatch.setattr(sys.modules["effseg.conversion.convert"], "peak_training_memory", predicted_once)

    def chosen(budget):
        converted = effseg.convert(network, memory="auto", memory_budget=budget)
        converted(image).sum().backward()
        (mode,) = converted.effseg_choices.values()
        return mode

    assert chosen("1GB") == "raw"
    raw = peaks["raw"].reserved
    assert chosen(raw) == "raw"
    assert chosen(raw - 1) == "block"
    block = peaks["block"].reserved
    assert chosen(block) == "block"
    message = r"training PlainConvUNet on 2x1x16x20x24 in fp32 needs .* the budget is"
    with pytest.raises(effseg.InputError, match=message):
        chosen(block - 1)
    assert peaks["raw"].shape == tuple(image.shape)
    converted = effseg.convert(network, memory="auto")
    with pytest.raises(effseg.InputError, match=r"memory_budget: .* on cpu needs one"):
        converted(image)
    assert converted.eval()(image).shape == (2, 3, 16, 20, 24)
