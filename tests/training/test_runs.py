"""Whole runs on tiny phantoms."""

import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import effseg
from effseg import phantom
from effseg.errors import InputError
from effseg.training import TrainingConfig, loop, train
from effseg.training.records import read_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return phantom.write_dataset(tmp_path_factory.mktemp("train") / "data", cases=6, shape=(20, 16, 12))


@pytest.fixture
def config(data, tmp_path):
    return TrainingConfig(
        data=data,
        output=tmp_path / "run",
        model="effseg-tiny",
        crop="none",
        cache=data.parent / "cache",
        steps=4,
        validation_interval=2,
        checkpoint_interval=2,
        workers=0,
    )


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than all steps of these runs."""
    for name in ("_overlay", "_draw_curves"):
        monkeypatch.setattr(loop._Run, name, lambda *arguments: None)


def train_and_kill(config, monkeypatch, step):
    """A run that ends with an error when it begins step `step`."""
    once = loop.Stepper.__call__

    def call(self, number, *arguments):
        if number == step:
            raise KeyboardInterrupt
        return once(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stepper, "__call__", call)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def test_a_run_leaves_all_that_it_promises(config):
    result = train(config)
    run = config.output
    rows = read_rows(run / "progress.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [bool(row["dice_mean"]) for row in rows] == [False, True, False, True]
    assert result.losses == [float(row["loss"]) for row in rows]
    assert result.losses[-1] < result.losses[0]
    assert (run / "curves.png").stat().st_size > 1000
    assert len(list((run / "overlays").glob("*.png"))) == 2
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "config.json").read_text()) == config.to_dict()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert set(result.best_dice) == set(phantom.NAMES[1:])
    assert result.best_step in (2, 4)
    assert result.steps_per_second > 0
    assert result.peak_memory > 0


@pytest.mark.usefixtures("no_pictures")
def test_saved_networks_say_how_they_are_to_be_used(config):
    result = train(config)
    for path in (result.best, result.final):
        extra = effseg.load(path).extra
        assert extra["labels"]["names"] == list(phantom.NAMES)
        assert extra["preprocessing"]["window"] == [-200.0, 400.0]
        assert extra["training"]["seed"] == 0
        assert str(config.output) not in json.dumps(extra)  # weights travel, folders do not
    assert effseg.load(result.final).extra["training"]["step"] == 4


@pytest.mark.usefixtures("no_pictures")
def test_the_validation_is_that_of_the_saved_network(config):
    from effseg.data.cases import find_cases
    from effseg.data.nifti import read_image, read_labels
    from effseg.evaluation.folders import dice_per_class
    from effseg.inference import load_predictor

    result = train(config.replace(validation="phantom_002"))
    case = next(case for case in find_cases(config.data, labelled=True) if case.name == "phantom_002")
    scan = read_image(case.images)
    for path, expected in ((result.best, result.best_dice), (result.final, result.final_dice)):
        dice = dice_per_class(load_predictor(path)(scan), read_labels(case.labels, scan), len(phantom.NAMES))
        np.testing.assert_allclose(dice[1:], list(expected.values()))


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.9, "workers": 2, "augment_on": "device"}, {"patch_size": (12, 12, 8)}]
)
@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_run_continues_bit_for_bit(config, monkeypatch, options):
    config = config.replace(validation_interval=3, **options)
    whole = train(config.replace(output=config.output / "whole"))
    stopped = config.replace(output=config.output / "stopped")
    train_and_kill(stopped, monkeypatch, 3)  # between the checkpoint of step 2 and the end
    assert len(read_rows(stopped.output / "progress.csv")) == 3
    result = train(stopped.replace(checkpoint_interval=1))
    assert result.losses == whole.losses
    for name in ("best", "final"):
        expected, got = (load_file(getattr(run, name)) for run in (whole, result))
        assert all(torch.equal(value, got[key]) for key, value in expected.items())
    assert result.best_dice == pytest.approx(whole.best_dice, nan_ok=True, abs=0)


@pytest.mark.parametrize(
    ("checkpoint_interval", "again"),
    [(2, (0.45, 0.48)), (4, (0.1, 0.2, 0.45, 0.48))],
    ids=["after", "before"],
)
@pytest.mark.usefixtures("no_pictures")
def test_the_best_network_is_the_one_in_its_file(config, monkeypatch, capsys, checkpoint_interval, again):
    """Also where a kill took all steps since a checkpoint, or the start, and other Dice comes of them."""
    config = config.replace(validation_interval=1, checkpoint_interval=checkpoint_interval)

    def validate_as(*values):
        dice = iter(values)
        monkeypatch.setattr(loop, "validate", lambda cases, segment, number, *_: [next(dice)] * (number - 1))

    validate_as(0.3, 0.5, 0.7)
    train_and_kill(config, monkeypatch, 3)
    best = config.output / "best.safetensors"
    file = best.read_bytes()
    validate_as(*again)
    result = train(config, console=Console(width=500))
    printed = capsys.readouterr().out
    assert "best.safetensors, of step 3 after the last checkpoint, stays: Dice 0.700" in printed
    assert (result.best_step, set(result.best_dice.values())) == (3, {0.7})
    assert best.read_bytes() == file
    told = effseg.load(best).extra["training"]
    assert (told["step"], set(told["dice"].values())) == (3, {0.7})


@pytest.mark.usefixtures("no_pictures")
def test_a_best_network_that_is_gone_is_not_the_best(config, monkeypatch):
    train_and_kill(config, monkeypatch, 3)
    best = config.output / "best.safetensors"
    weights = best.read_bytes()
    effseg.EffSegNet(1, 3, preset="tiny").save(best)
    with pytest.raises(InputError, match="expected this run's best network"):
        train(config)
    best.unlink()
    result = train(config)
    assert result.best_step == 4
    assert effseg.load(best).extra["training"]["step"] == 4
    best.write_bytes(weights)
    assert train(config).best_step == 2


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_is_left_as_it_is(config):
    first = train(config)
    again = train(config)
    assert again.losses == first.losses
    assert again.best_dice == pytest.approx(first.best_dice, nan_ok=True, abs=0)
    assert again.final_dice == pytest.approx(first.final_dice, nan_ok=True, abs=0)
    assert math.isnan(again.steps_per_second)


@pytest.mark.usefixtures("no_pictures")
def test_another_configuration_is_refused_unless_overwritten(config):
    train(config.replace(steps=2))
    with pytest.raises(InputError, match="steps = 2, but now it is 3"):
        train(config.replace(steps=3))
    assert len(train(config.replace(steps=3), overwrite=True).losses) == 3


@pytest.mark.usefixtures("no_pictures")
def test_foreign_files_in_the_folder_stay(config):
    config.output.mkdir()
    (config.output / "notes.txt").write_text("mine")
    train(config.replace(steps=1))
    train(config.replace(steps=2), overwrite=True)
    assert (config.output / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("no_pictures")
def test_without_validation_the_final_network_is_the_one_to_use(config):
    result = train(config.replace(fold="all", steps=2))
    assert result.best is None
    assert result.checkpoint == config.output / "final.safetensors"
    assert result.best_dice == {}
    assert not (config.output / "best.safetensors").exists()


@pytest.mark.usefixtures("no_pictures")
def test_averaged_weights_are_validated_and_saved(config):
    plain = train(config)
    averaged = train(config.replace(ema=0.9, output=config.output / "ema"))
    assert averaged.losses == plain.losses
    weights = [load_file(result.final)["head.weight"] for result in (plain, averaged)]
    assert not torch.equal(*weights)
    checkpoint = next((averaged.final.parent / "checkpoints").iterdir()) / "model.safetensors"
    assert torch.equal(load_file(checkpoint)["head.weight"], weights[0])


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.usefixtures("no_pictures")
def test_the_norm_is_the_networks(config, norm):
    result = train(config.replace(norm=norm, steps=2, batch_size=2))
    assert effseg.load(result.final).arguments["norm"] == norm


def test_batch_norm_of_one_voxel_does_not_begin(config):
    with pytest.raises(InputError, match=r"^norm: expected more than one voxel at the lowest level"):
        train(config.replace(norm="batch"))
    assert not (config.output / "config.json").exists()


@pytest.mark.usefixtures("no_pictures")
def test_bf16_on_a_cpu(config):
    losses = [
        train(config.replace(dtype=dtype, steps=3, output=config.output / dtype)).losses
        for dtype in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "stream", "recompute": 1},
        pytest.param({"memory_budget": "1GB"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_memory_modes_learn_the_same(config, options, tmp_path):
    expected = train(config.replace(output=tmp_path / "raw", memory="raw"))
    got = train(config.replace(output=tmp_path / "other", **options))
    assert got.losses == pytest.approx(expected.losses, rel=1e-3)


@pytest.mark.slow
def test_offloading_learns_the_same(config, tmp_path):
    config = config.replace(model="effseg-base", memory="stream")
    expected, got = (
        train(config.replace(output=tmp_path / str(offload), offload=offload)) for offload in (False, True)
    )
    assert got.losses == pytest.approx(expected.losses, rel=1e-3)
