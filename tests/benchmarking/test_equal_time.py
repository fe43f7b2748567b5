"""Whole volumes against patches, on phantoms on which nothing can be learnt."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks.accuracy import equal_time
from benchmarks.accuracy.equal_time import PATCHES, WHOLE, Pace, Plan
from effseg import phantom

TINY = Plan(shape=(20, 16, 16), training=2, validation=1, patch_size=(16, 16, 16))


@pytest.fixture
def quick(monkeypatch):
    """Three steps are timed, and no picture is drawn."""
    monkeypatch.setattr(equal_time, "PROBE_STEPS", 3)
    monkeypatch.setattr(equal_time, "WARM", 1)
    monkeypatch.setattr("effseg.figures.draw_overlay", lambda *args, **options: None)
    monkeypatch.setattr("effseg.figures.draw_curves", lambda *args, **options: None)


@pytest.fixture
def in_their_place(monkeypatch):
    """A tiny network trains in the place of both, whose checkpoints take longer than their steps."""
    run = equal_time._run
    monkeypatch.setattr(
        equal_time, "_run", lambda config, console: run(config.replace(model="effseg-tiny"), console)
    )


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_the_real_ones_train_and_are_scored(tmp_path):
    assert_both_are_scored(tmp_path)


@pytest.mark.usefixtures("quick", "in_their_place")
def test_both_train_and_are_scored(tmp_path):
    assert_both_are_scored(tmp_path)


def assert_both_are_scored(tmp_path):
    found = equal_time.compare(tmp_path / "out", minutes=1e-3, device="cpu", plan=TINY)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["accuracy.json"]
    assert json.loads((tmp_path / "out/accuracy.json").read_text()) == found
    assert found.keys() == {"machine", "versions", "conditions", "organs", "networks"}
    assert found["conditions"]["data"] == "phantoms 20x16x16"
    assert (found["conditions"]["training_cases"], found["conditions"]["validation_cases"]) == (2, 1)
    whole, patches = found["networks"][WHOLE], found["networks"][PATCHES]
    assert (whole["patch_size"], patches["patch_size"]) == (None, [16, 16, 16])
    for row, voxels in ((whole, 20 * 16 * 16), (patches, 16**3)):
        assert row["steps"] == 1  # of a budget that the timed steps have used up
        assert row["voxels_per_second"] * row["training_seconds"] == pytest.approx(voxels)
        assert row["dice"].keys() == set(phantom.NAMES[1:])
        assert 0 <= row["mean_dice"] <= 1
        assert row["peak_bytes_allocated"] is None


@pytest.fixture
def trained(monkeypatch):
    """What would have been trained, for steps of 0.1 and 0.4 s and validations of 5 s."""
    configs = []

    class Result:
        final_dice, skipped, steps_per_second, peak_memory = {"liver": 0.5, "spleen": np.nan}, 0, 10.0, 7

    def run(config, console):
        configs.append(config)
        return Result()

    def pace(config, console):
        return Pace(0.1 if config.patch_size else 0.4, 5.0)

    monkeypatch.setattr(equal_time, "_run", run)
    monkeypatch.setattr(equal_time, "_pace", pace)
    return configs


def test_both_have_the_same_time(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(equal_time.time, "monotonic", lambda: 100.0)
    found = equal_time.compare(tmp_path, minutes=2, device="cpu", plan=TINY)
    # Of 120 s 10 go to the validations, 6 are spare, 52 are for each.
    assert {config.model: config.steps for config in trained} == {WHOLE: 130, PATCHES: 520}
    assert found["networks"][WHOLE]["dice"] == {"liver": 0.5, "spleen": None}
    assert found["networks"][WHOLE]["mean_dice"] == 0.5


def test_what_is_complete_is_not_trained_again(trained, tmp_path, capsys):
    equal_time.compare(tmp_path, minutes=0.1, device="cpu", plan=TINY)
    del trained[:]
    before = (tmp_path / "accuracy.json").read_text()
    assert equal_time.main(["--output", str(tmp_path), "--resume"]) == 0
    assert (trained, (tmp_path / "accuracy.json").read_text()) == ([], before)
    half = json.loads(before)
    del half["networks"][PATCHES]
    (tmp_path / "accuracy.json").write_text(json.dumps(half))
    assert not equal_time._is_complete(tmp_path / "accuracy.json")
    assert capsys.readouterr().out == f"{tmp_path / 'accuracy.json'} has both\n"


def test_nobody_trains_on_what_is_scored(trained, tmp_path):
    equal_time.compare(tmp_path, minutes=0.1, device="cpu", plan=TINY)
    assert {(config.cases, config.validation) for config in trained} == {(None, "phantom_002")}


def test_a_folder_of_scans(trained, tmp_path, capsys):
    data = phantom.write_dataset(tmp_path / "data", cases=5, shape=(16, 12, 12), unseen=0)
    arguments = [
        "--output",
        str(tmp_path / "out"),
        "--data",
        str(data),
        "--device",
        "cpu",
        "--minutes",
        "0.1",
    ]
    # The patches of 64 voxels are larger than these scans, which a run would refuse.
    assert equal_time.main(arguments) == 0
    assert {config.data for config in trained} == {data}
    text = (tmp_path / "out/accuracy.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["conditions"]["training_cases"] == 4
    assert "unet3d: " in capsys.readouterr().out


@pytest.mark.parametrize("module", ["nibabel", "monai"])
def test_what_is_not_installed_skips_it(tmp_path, monkeypatch, capsys, module):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else known(name))
    assert equal_time.main(["--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"skipped: {module} is not installed\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--minutes", "0"], "--minutes"), (["--device", "tpu"], "device"), (["--data", "nowhere"], "nowhere")],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, named):
    assert equal_time.main(["--output", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("accuracy: error: ")
    assert named in err
    assert err.count("\n") == 1
