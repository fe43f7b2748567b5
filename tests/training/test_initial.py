"""Weights to begin with."""

import pytest
import torch

import effseg
from effseg.errors import InputError
from effseg.models.registry import build_model
from effseg.training.initial import describe_file, initial_weights, take_weights


def saved(path, classes=3, channels=1, **options):
    torch.manual_seed(1)
    model = effseg.EffSegNet(channels, classes, **{"preset": "tiny"} | options)
    model.save(path, labels=[f"organ {number}" for number in range(1, classes)])
    return model.state_dict()


def fresh(classes=3, channels=1, **options):
    torch.manual_seed(2)
    return effseg.EffSegNet(channels, classes, **{"preset": "tiny", "memory": "raw"} | options)


def names(classes):
    return ("background", *(f"organ {number}" for number in range(1, classes)))


def test_all_of_them(tmp_path):
    weights, model = saved(tmp_path / "w.safetensors"), fresh()
    said = take_weights(model, tmp_path / "w.safetensors", names(3))
    assert said == f"begins with the weights of {tmp_path / 'w.safetensors'}"
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_head_of_another_number_of_classes_is_made_anew(tmp_path):
    weights, model = saved(tmp_path / "w.safetensors", classes=5), fresh()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    said = take_weights(model, tmp_path / "w.safetensors", names(3))
    assert said.endswith("; the head is made anew for 3 classes, it had 5")
    head = {key for key, value in before.items() if value.shape != weights[key].shape}
    assert head == {key for key in before if key.startswith("head.")}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in head else weights[key])


def test_the_same_number_of_other_classes_is_told(tmp_path):
    saved(tmp_path / "w.safetensors")
    said = take_weights(fresh(), tmp_path / "w.safetensors", ("background", "liver", "spleen"))
    assert said.endswith(
        "its classes were background, organ 1, organ 2, now they are background, liver, spleen"
    )


def test_other_networks_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    saved(path, channels=2)
    with pytest.raises(InputError, match=r"^init: .*expected weights of effseg-tiny with 1 channels, got "):
        take_weights(fresh(), path, names(3))
    saved(path, preset="base")
    with pytest.raises(
        InputError, match=r"^init: .*expected weights of effseg-tiny, got those of effseg-base"
    ):
        take_weights(fresh(), path, names(3))
    saved(path, classes=5)
    with pytest.raises(InputError, match=r"^init: "):
        take_weights(build_model("unet3d", 1, 3), path, names(3))


@pytest.mark.parametrize(
    ("option", "own", "other"),
    [
        ("norm", "instance", "group"),  # whose tensors have the same keys and shapes
        ("norm", "group", "instance"),
        ("norm", "instance", "batch"),
        ("auxiliary", False, True),
        ("thick_axis", None, 2),
    ],
)
def test_weights_of_another_function_are_refused(tmp_path, option, own, other):
    path = tmp_path / "w.safetensors"
    saved(path, **{option: other})
    model = fresh(**{option: own})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    told = f"^init: .*expected weights of effseg-tiny with {option} = {own}, got .* with {option} = {other}$"
    with pytest.raises(InputError, match=told):
        take_weights(model, path, names(3))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_how_a_network_is_computed_does_not_matter(tmp_path):
    weights = saved(tmp_path / "w.safetensors", memory="stream", recompute=1)
    model = fresh()
    take_weights(model, tmp_path / "w.safetensors", names(3))
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_which_file_of_a_run(tmp_path):
    with pytest.raises(InputError, match="without best"):
        initial_weights(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-00000012"
    checkpoint.mkdir(parents=True)
    assert initial_weights(tmp_path) == checkpoint / "model.safetensors"
    for name in ("final.safetensors", "best.safetensors"):
        saved(tmp_path / name)
        assert initial_weights(tmp_path) == tmp_path / name
    assert initial_weights(tmp_path / name) == tmp_path / name
    described = [describe_file(tmp_path / name) for name in ("final.safetensors", "best.safetensors")]
    assert described[0]["sha256"] == described[1]["sha256"]
    assert described[0]["path"] == str(tmp_path / "final.safetensors")
