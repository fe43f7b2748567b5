"""What a GPU's allocator reserves for a training step, beside what lives."""

from importlib import import_module

import pytest
import torch

from effseg.common import device
from effseg.conversion import convert
from effseg.memory import peak_training_memory
from effseg.memory.trace import LARGEST_WORKSPACE
from effseg.models.effsegnet import EffSegNet
from effseg.models.unet3d import UNet3D

SMALL = (1, 1, 32, 32, 32)


def report(shape, memory="stream", levels=0, dtype="bf16", classes=15, kind="cuda", **options):
    def build():
        model = EffSegNet(shape[1], classes, memory=memory, **options)
        model.recompute_levels = levels
        return model

    return peak_training_memory(build, shape, dtype=dtype, device=kind)


@pytest.mark.usefixtures("small_preset")
def test_figures_are_in_order():
    found = report(SMALL, classes=4, preset="small")
    assert found.peak < found.allocated < found.reserved
    assert found.reserved_expandable <= found.reserved
    assert 0 < found.workspace < LARGEST_WORKSPACE
    text = str(found)
    assert "reserved" in text
    assert "in tensors" in text
    assert found.to_dict()["reserved"] == found.reserved


@pytest.mark.usefixtures("small_preset")
def test_a_cpu_reserves_nothing():
    found = report(SMALL, classes=4, kind="cpu", preset="small")
    assert found.peak == found.allocated == found.reserved == found.reserved_expandable
    assert found.workspace == 0


def test_a_network_in_stock_torch_is_replayed_too():
    found = peak_training_memory(lambda: UNet3D(1, 3), (1, 1, 32, 32, 32), device="cuda")
    assert found.peak < found.allocated < found.reserved


def test_no_room_is_asked_for_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("room on a CPU"))
    device.make_room(torch.device("cpu"), 2**20)


def test_where_there_is_no_room_none_is_made(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with device.pretending("cuda"):
        device.make_room(torch.device("cpu"), 2**20)


def test_room_is_made_for_what_is_stored_next(monkeypatch):
    """32 channels at half the resolution, in bf16."""
    asked = []
    for module in ("operators.conv3d", "operators.tail_sweeps", "models.effsegnet"):
        monkeypatch.setattr(
            import_module(f"effseg.{module}"), "make_room", lambda _, *sizes: asked.append(sizes)
        )
    report(SMALL, classes=4)
    stored = 2 * 32 * 16**3
    assert asked[0] == (stored,)  # before the first layer
    assert asked[-1][0] == stored  # before the last one


@pytest.mark.slow
@pytest.mark.parametrize("levels", [0, 1])
@pytest.mark.parametrize(
    ("size", "bar"), [((512, 512, 256), 1.08), ((512, 512, 512), 1.08), ((300, 470, 390), 1.1)]
)
def test_little_is_reserved_beyond_what_lives(size, bar, levels):
    found = report((1, 1, *size), levels=levels)
    assert found.reserved <= bar * found.peak
    assert found.allocated <= bar * found.peak


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "bar"), [("raw", 1.1), ("block", 1.15)])
def test_converted_networks_are_replayed(memory, bar):
    from effseg.benchmarking.networks import plain_conv_unet

    model = convert(plain_conv_unet(15), memory=memory, shape=(1, 1, 128, 128, 128))
    found = peak_training_memory(model, (1, 1, 256, 256, 128), device="cuda")
    assert found.reserved <= bar * found.peak


@pytest.mark.slow
@pytest.mark.usefixtures("small_preset")
def test_what_augmentation_takes_is_free_for_the_step():
    """Its tensors end before the step begins, so the step's blocks serve it or are served by its own."""
    shape = (1, 1, 64, 64, 64)
    build = lambda: EffSegNet(1, 15, "small", memory="stream")  # noqa: E731
    alone, augmented = (
        peak_training_memory(build, shape, device="cuda", augmented=augmented) for augmented in (False, True)
    )
    labels_as_floats = 4 * alone.voxels
    assert augmented.peak == alone.peak
    assert augmented.reserved - alone.reserved <= labels_as_floats
