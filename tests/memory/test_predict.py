"""Predictions against the same step run for real, and their contract; published figures: benchmarking/."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from effseg.benchmarking.networks import plain_conv_unet
from effseg.errors import InputError
from effseg.memory import measure_training_memory, peak_training_memory
from effseg.memory.autocast import CudaAutocast
from effseg.models.effsegnet import EffSegNet
from effseg.models.stock import StockEffSegNet
from effseg.models.unet3d import UNet3D


class Small(nn.Module):
    """Two convolutions, optionally recomputed in backward."""

    def __init__(self, recompute=False):
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 16, 3, padding=1), nn.Conv3d(16, 3, 3, padding=1)
        self.recompute = recompute

    def forward(self, x):
        def body(x):
            return self.second(torch.relu(self.first(x)))

        return checkpoint(body, x, use_reentrant=False) if self.recompute else body(x)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_prediction_equals_the_measured_step(optimizer):
    shape, options = (1, 1, 33, 24, 24), {"include_background": True}
    make = lambda: UNet3D(1, 4)  # noqa: E731
    predicted = peak_training_memory(make, shape, dtype="fp32", optimizer=optimizer, loss_options=options)
    measured = measure_training_memory(make, shape, 4, optimizer=optimizer, loss_options=options)
    assert predicted.peak == pytest.approx(measured.outside_convolutions, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "dtype", "size", "slab"),
    [
        ("small", "fp32", (32, 32, 32), 2**15),
        pytest.param("base", "fp32", (64, 48, 48), 2**18, marks=pytest.mark.slow),
        pytest.param("base", "bf16", (64, 48, 48), 2**18, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("small_preset")
def test_prediction_equals_the_measured_step_of_effsegnet(preset, dtype, size, slab):
    """Thin slabs, so that scratch inside the CPU's batch norm, which works on one, does not matter."""

    def make():
        model = EffSegNet(1, 4, preset)
        model.slab_elements = slab
        return model

    shape = (1, 1, *size)
    predicted = peak_training_memory(make, shape, dtype=dtype)
    measured = measure_training_memory(make, shape, 4, dtype=dtype)
    assert predicted.peak == pytest.approx(measured.outside_convolutions, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: EffSegNet(1, 15), lambda: StockEffSegNet(1, 15), lambda: plain_conv_unet(15)]
)
def test_prediction_equals_the_measured_step_at_96(make):
    predicted = peak_training_memory(make, (1, 1, 96, 96, 96), dtype="fp32")
    measured = measure_training_memory(make, (1, 1, 96, 96, 96), 15)
    assert predicted.peak == pytest.approx(measured.outside_convolutions, rel=0.05)


def test_a_recomputed_layer_is_not_saved():
    shape = (1, 1, 32, 32, 32)
    plain = peak_training_memory(Small, shape, dtype="fp32")
    recomputed = peak_training_memory(lambda: Small(recompute=True), shape, dtype="fp32")
    hidden = 16 * 4 * 32**3
    assert plain.after_forward - recomputed.after_forward == pytest.approx(hidden, rel=0.01)


def test_split_and_largest_account_for_the_peak():
    report = peak_training_memory(lambda: UNet3D(1, 3), (2, 1, 32, 24, 16), dtype="bf16")
    assert sum(report.split.values()) == report.peak
    weights = sum(p.numel() for p in UNet3D(1, 3).parameters())
    assert report.parameters == weights
    assert 4 * weights <= report.split["parameters"] <= 4.01 * weights
    assert 8 * weights <= report.split["optimizer"] <= 8.01 * weights
    assert report.voxels == 2 * 32 * 24 * 16
    assert report.split["batch"] == report.voxels * (4 + 8)
    assert list(report.largest) == sorted(report.largest, key=lambda tensor: -tensor.nbytes)
    assert "outside the figure" in str(report).lower()
    assert f"{report.bytes_per_voxel:.0f} B/voxel" in str(report)


@pytest.mark.usefixtures("small_preset")
def test_labels_of_our_networks_are_counted_as_bytes():
    report = peak_training_memory(lambda: EffSegNet(1, 3, "small"), (1, 1, 16, 16, 16))
    assert report.split["batch"] == report.voxels * (4 + 1)


def test_a_built_model_is_left_untouched_and_predicted_alike():
    model = UNet3D(1, 3).eval()
    before = {key: (tensor, tensor.clone()) for key, tensor in model.state_dict(keep_vars=True).items()}
    report = peak_training_memory(model, (1, 1, 16, 16, 32))
    assert report == peak_training_memory(lambda: UNet3D(1, 3), (1, 1, 16, 16, 32))
    assert not model.training
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[key][0]
        assert torch.equal(tensor, before[key][1])
        assert tensor.grad is None


def test_shared_weights_stay_shared():
    model = nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1), nn.Conv3d(3, 3, 3, padding=1), nn.Conv3d(3, 3, 3, padding=1)
    )
    model[2].weight = model[1].weight
    report = peak_training_memory(model, (1, 1, 16, 16, 16), dtype="fp32")
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_frozen_parameters_have_no_gradient_and_no_state():
    model = UNet3D(1, 3)
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    shape = (1, 1, 16, 16, 32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert peak_training_memory(model, shape).split["optimizer"] == pytest.approx(8 * trained, rel=0.01)


def test_deep_supervision_keeps_what_its_second_output_needs():
    """Of three outputs the coarsest has weight 0; of the one at half the resolution the loss keeps softmax
    and log-softmax, and little else."""
    pytest.importorskip("dynamic_network_architectures")
    shape, features = (1, 1, 64, 64, 64), (8, 16, 32, 32)
    one = peak_training_memory(lambda: plain_conv_unet(15, features), shape, dtype="fp32")
    deep = peak_training_memory(
        lambda: plain_conv_unet(15, features, deep_supervision=True), shape, dtype="fp32"
    )
    output = 15 * 4 * 32**3
    assert 2 * output < deep.after_forward - one.after_forward < 3 * output


def test_own_loss_and_its_options_are_used():
    def loss(logits, labels, scale):
        return (logits * scale).exp().mean()

    cheap = peak_training_memory(Small, (1, 1, 8, 8, 8), loss=loss, loss_options={"scale": 2.0})
    assert cheap.after_forward < peak_training_memory(Small, (1, 1, 8, 8, 8)).after_forward


@pytest.mark.usefixtures("small_preset")
def test_class_weights_may_be_real_tensors():
    options = {"class_weights": torch.tensor([0.5, 1.0, 2.0])}
    for make in (lambda: UNet3D(1, 3), lambda: EffSegNet(1, 3, "small")):
        assert peak_training_memory(make, (1, 1, 16, 16, 16), loss_options=options).peak > 0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"shape": (1, 16, 16, 16)}, r"shape: expected \(N, C, D, H, W\)"),
        ({"shape": (1, 1, 0, 16, 16)}, r"shape: expected \(N, C, D, H, W\)"),
        ({"shape": (1, 2, 16, 16, 16)}, r"image: expected \(N, 1, D, H, W\)"),
        ({"dtype": "fp8"}, "dtype: expected one of fp32, bf16, got 'fp8'"),
        ({"optimizer": "lion"}, "optimizer: expected adamw or sgd, got 'lion'"),
    ],
)
def test_wrong_arguments_are_named(change, line):
    arguments = {"model": lambda: UNet3D(1, 3), "shape": (1, 1, 16, 16, 16)} | change
    with pytest.raises(InputError, match=line):
        peak_training_memory(**arguments)


def test_cuda_autocast_rules():
    weight = torch.randn(4, 1, 1, 1, 1, requires_grad=True)
    with CudaAutocast() as rules:
        y = nn.functional.conv3d(torch.randn(1, 1, 2, 2, 2), weight)
        assert y.dtype == torch.bfloat16
        assert torch.softmax(y, 1).dtype == torch.float32
        assert nn.functional.group_norm(y, 2).dtype == torch.float32
        assert nn.functional.instance_norm(y).dtype == torch.bfloat16
        assert nn.functional.max_pool3d(y, 2).dtype == torch.bfloat16
        again = nn.functional.conv3d(torch.randn(1, 1, 2, 2, 2), weight)
        assert len(rules._weights) == 1
    assert again.grad_fn is not None


def _calls(device):
    """Calls that a network or a loss makes of tensors in bf16, float32 or both, by name."""
    low = torch.empty(4, 4, device=device, dtype=torch.bfloat16)
    wide, volume = torch.empty(4, 4, device=device), low.expand(1, 4, 4, 4, 4)
    grid = torch.empty(1, 4, 4, 4, 3, device=device)
    up = partial(nn.functional.interpolate, volume, scale_factor=2)
    return {
        "trilinear": lambda: up(mode="trilinear"),
        "nearest": up,
        "area": lambda: up(mode="area"),
        "Upsample": lambda: nn.Upsample(scale_factor=2, mode="trilinear")(volume),
        "grid_sample": lambda: nn.functional.grid_sample(volume, grid, align_corners=False),
        "sum": lambda: volume.sum((2, 3, 4)),
        "mean": lambda: volume.mean((2, 3, 4)),
        "logsumexp": lambda: low.logsumexp(1),
        "softmax": lambda: low.softmax(1),
        "rms_norm": lambda: nn.functional.rms_norm(low, (4,)),
        "normalize": lambda: nn.functional.normalize(low),
        "batch_norm": lambda: nn.functional.batch_norm(volume, None, None, training=True),
        "1 / x": lambda: 1 / low,
        "x / 2": lambda: low / 2,
        "2 ** x": lambda: 2**low,
        "square": lambda: low.square(),
        "rmatmul": lambda: wide.__rmatmul__(wide),
        "inner": lambda: torch.inner(wide, wide),
        "tensordot": lambda: torch.tensordot(wide, low, 1),
        "einsum": lambda: torch.einsum("ij,jk->ik", wide, low),
    }


def _types(device, rules):
    with FakeTensorMode():
        calls = _calls(device)
        with rules:
            return {name: call().dtype for name, call in calls.items()}


def test_cuda_autocast_rules_are_torchs():
    """Fake tensors of a GPU, which C++ takes for its own, say what torch makes of each call."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)  # not torch.autocast, which is off where there is no GPU
    try:
        wanted = _types("cuda", nullcontext())
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert _types("cpu", CudaAutocast()) == wanted


def test_upsampling_in_bf16_is_counted_as_torchs_autocast_does_it():
    """In float32, as is what it makes."""

    class Upsampling(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv3d(1, 4, 1, stride=2), nn.Upsample(scale_factor=2, mode="trilinear"))

    options = {"loss": lambda logits, labels: logits.mean(), "label_dtype": torch.uint8}
    report = peak_training_memory(Upsampling, (1, 1, 64, 64, 64), **options)
    assert ("float32", 16.0) in {(t.dtype, t.nbytes / 64**3) for t in report.largest}


class Strided(nn.Module):
    """Reads one voxel in 512, so that its step needs next to nothing beside the batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 1, stride=8)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(("batch", "bytes_per_voxel"), [(1, 5 + 5 + 0.9), (2, 5 + 5)])
def test_augmentation_on_the_device_is_counted(batch, bytes_per_voxel):
    """Image, labels, a copy of both and slabs; of several volumes one after the other, which are stacked."""
    options = {"loss": lambda logits, labels: logits.sum(), "label_dtype": torch.uint8, "dtype": "fp32"}
    shape = (batch, 1, 512, 512, 256)
    alone = peak_training_memory(Strided, shape, **options)
    assert alone.bytes_per_voxel == pytest.approx(5, rel=0.02)
    augmented = peak_training_memory(Strided, shape, augmented=True, **options)
    assert augmented.bytes_per_voxel == pytest.approx(bytes_per_voxel, rel=0.01)
    assert augmented.phase == "augmentation"
    assert augmented.after_forward == alone.after_forward


@pytest.mark.slow
@pytest.mark.usefixtures("small_preset")
def test_augmentation_never_decides_which_mode_fits():
    """A step of the leanest mode needs several times as much."""
    model = EffSegNet(1, 3, "small", memory="stream", recompute=2)
    model.slab_elements = 1
    shape = (1, 1, 64, 48, 32)
    peaks = [peak_training_memory(model, shape, augmented=augmented).peak for augmented in (False, True)]
    assert peaks[0] == peaks[1]


def test_attention_written_as_einsum_takes_autocasts_type():
    """Softmax gives float32, values are bfloat16: einsum, which is matrix products inside, casts both."""
    attention, values = torch.rand(1, 3, 3), torch.rand(1, 3, 4, dtype=torch.bfloat16)
    with CudaAutocast():
        assert torch.einsum("nij,njc->nic", attention, values).dtype == torch.bfloat16
        assert torch.einsum("nij,njc->nic", [attention, values]).dtype == torch.bfloat16
