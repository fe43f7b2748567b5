import json
from pathlib import Path

import pytest
import torch

from effseg.errors import InputError
from effseg.training import TrainingConfig


def make(**values):
    return TrainingConfig(data=Path("data"), output=Path("run"), **values)


def test_survives_json():
    config = make(labels="openkbp", patch_size=(32, 48, 16), spacing=(1.5, 1.5, 3), fold="all", epochs=3)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(InputError, match="'stride'"):
        TrainingConfig.from_dict(make().to_dict() | {"stride": 2})
    with pytest.raises(InputError, match="'output'"):
        TrainingConfig.from_dict({"data": "data"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -1.0),
        ("warmup", 1.0),
        ("clip_norm", 0.0),
        ("class_weights", "linear"),
        ("label_smoothing", 1.0),
        ("dtype", "fp16"),
        ("norm", "layer"),
        ("ema", 1.0),
        ("fold", -1),
        ("fold", "none"),
        ("patch_size", (32, 32)),
        ("patch_size", (32, 32, 0)),
        ("window", (400.0, -200.0)),
        ("spacing", (1.0, 0.0, 1.0)),
        ("crop", "head"),
        ("augment_on", "gpu"),
        ("augment_strength", 0.0),
        ("augment_strength", 5.0),
        ("seed", -1),
        ("workers", -1),
        ("validation_interval", 0),
        ("checkpoint_interval", 0),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(InputError, match=f"^{name}: "):
        make(**{name: value})


def test_contradictions_are_refused():
    with pytest.raises(InputError, match=r"^fold: "):
        make(fold=1, validation="case001")
    with pytest.raises(InputError, match=r"^ce_weight: "):
        make(dice_weight=0.0, ce_weight=0.0)
    with pytest.raises(InputError, match=r"^norm: "):
        make(model="unet3d", norm="group")
    with pytest.raises(InputError, match=r"^augment_strength: "):
        make(augment=False, augment_strength=2.0)


def test_default_rate_depends_on_the_network():
    assert make().peak_rate == 4e-3
    assert make(model="unet3d").peak_rate == 1e-3
    assert make(model="unet3d", learning_rate=0.02).peak_rate == 0.02


def test_a_continuation_may_only_differ_where_no_number_changes():
    run = make(steps=10)
    make(steps=10, workers=4, checkpoint_interval=7).check_continues(run)
    make(steps=10, batch_size=2).check_continues(run)  # more processes, or fewer: see test_checks.py
    with pytest.raises(InputError, match="seed = 0, but now it is 1"):
        make(steps=10, seed=1).check_continues(run)


def test_where_volumes_are_augmented():
    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    assert [make().augments_on(device) for device in (cpu, gpu)] == [False, True]
    assert [make(augment_on="cpu").augments_on(device) for device in (cpu, gpu)] == [False, False]
    assert [make(augment_on="device").augments_on(device) for device in (cpu, gpu)] == [True, True]
    assert not make(augment=False, augment_on="device").augments_on(gpu)
    with pytest.raises(InputError, match="augment_on = auto, but now it is cpu"):
        make(augment_on="cpu").check_continues(make())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"memory": "raw"}, "offload"),
        ({"model": "unet3d"}, "offload"),
        ({"model": "effseg-tiny"}, "offload"),
        ({"split_volume": 2}, "offload"),
        ({"memory": "stream", "recompute": 1}, "recompute"),
    ],
)
def test_what_cannot_be_offloaded_is_named(tmp_path, options, name):
    with pytest.raises(InputError, match=f"^{name}: expected"):
        TrainingConfig(data=tmp_path / "data", output=tmp_path / "out", offload=True, **options)
