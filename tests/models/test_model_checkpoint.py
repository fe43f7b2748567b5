"""Checkpoints: exact round trip; anything else is one clear line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from effseg.data.preprocessing import Preprocessing
from effseg.errors import InputError
from effseg.models.effsegnet import EffSegNet
from effseg.models.registry import load
from effseg.models.unet3d import UNet3D

EXTRA = {"labels": ["background", "liver"], "preprocessing": {"window": [-200.0, 400.0]}}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UNet3D(1, 2)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    model.save(path, EXTRA)
    return path


def rewrite(saved, path, *, weights=None, **header):
    """A copy of the checkpoint with parts of its header or its weights replaced."""
    tensors = load_file(saved)
    metadata = {
        "format": 1,
        "class": "UNet3D",
        "arguments": {"in_channels": 1, "num_classes": 2},
        "extra": {},
    }
    save_file(
        weights(tensors) if weights else tensors, path, metadata={"effseg": json.dumps(metadata | header)}
    )
    return path


def test_round_trip(model, saved):
    back = load(saved)
    assert type(back) is UNet3D
    assert not back.training
    assert back.arguments == model.arguments
    assert back.extra == EXTRA
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key


def test_dtype_of_the_weights_is_kept(tmp_path):
    torch.manual_seed(0)
    model = UNet3D(1, 2).to(torch.bfloat16)
    model.save(tmp_path / "half.safetensors")
    assert load(tmp_path / "half.safetensors").head.weight.dtype == torch.bfloat16


def test_failed_save_leaves_the_old_file(model, saved):
    before = saved.read_bytes()
    with pytest.raises(InputError, match="extra: expected JSON values only"):
        UNet3D(1, 2).save(saved, {"bad": object()})
    with pytest.raises(InputError, match="extra: expected JSON values only"):
        UNet3D(1, 2).save(saved, {"bad": float("nan")})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_files(saved, tmp_path, size):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(InputError, match=r"cut\.safetensors: not a readable checkpoint"):
        load(path)


def test_a_text_file_renamed(tmp_path):
    path = tmp_path / "text.safetensors"
    path.write_text("this is no checkpoint at all\n" * 50)
    with pytest.raises(InputError, match=r"text\.safetensors: not a readable checkpoint"):
        load(path)


def test_a_pickle_is_not_opened(tmp_path):
    path = tmp_path / "pickle.safetensors"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load(path)


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="not a checkpoint of effseg"):
        load(path)


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ({"format": 99}, "expected checkpoint format 1, got 99"),
        ({"class": "os.system"}, "expected a network of EffSegNet, StockEffSegNet, UNet3D, got 'os.system'"),
        ({"arguments": {"in_channels": 1, "classes": 2}}, "cannot build UNet3D: "),
        ({"arguments": {"in_channels": 1, "num_classes": 1}}, "cannot build UNet3D: num_classes: expected 2"),
        ({"arguments": [1, 2]}, "expected tables of arguments"),
        (
            {"arguments": {"in_channels": 1, "num_classes": 3}},
            r"'head.weight': expected shape \(3, 64, 1, 1, 1\), got \(2, ",
        ),
    ],
)
def test_wrong_headers_are_named(saved, tmp_path, header, line):
    path = rewrite(saved, tmp_path / "odd.safetensors", **header)
    with pytest.raises(InputError, match=line) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_missing_and_unknown_tensors_are_named(saved, tmp_path):
    def without_head(tensors):
        return {key: tensor for key, tensor in tensors.items() if not key.startswith("head")}

    with pytest.raises(InputError, match=r"lacks 'head\.bias' \(2 of "):
        load(rewrite(saved, tmp_path / "a.safetensors", weights=without_head))
    with pytest.raises(InputError, match="holds an unknown 'zebra'"):
        load(rewrite(saved, tmp_path / "b.safetensors", weights=lambda t: t | {"zebra": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("head.bias", torch.nan), ("head.weight", torch.inf), ("encoder.0.enter.norm.running_var", torch.inf)],
)
def test_numbers_that_are_not_finite_are_named(tmp_path, key, value):
    """Every voxel would be background."""
    model = EffSegNet(1, 2, "tiny", norm="batch")
    model.state_dict()[key].fill_(value)
    model.save(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=rf"bad\.safetensors: '{key}': expected finite numbers"):
        load(tmp_path / "bad.safetensors")


def test_windows_of_another_number_of_channels_are_not_saved(model, tmp_path):
    two = Preprocessing(window=((-200, 400), (0, 1)))
    with pytest.raises(InputError, match="window: expected one a channel, 1, got 2"):
        model.save(tmp_path / "x.safetensors", preprocessing=two)
    assert not list(tmp_path.iterdir())
