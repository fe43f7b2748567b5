import io

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from effseg import phantom
from effseg.cli import main
from effseg.errors import InputError
from effseg.phantom import demo

TINY = demo.Plan(shape=(32, 24, 24), training=2, validation=1)


@pytest.fixture
def quick(monkeypatch):
    """Two steps and no table of memory: the way is walked, nothing is learnt."""
    monkeypatch.setattr(demo, "FEWEST_STEPS", 2)
    monkeypatch.setattr(demo, "MOST_STEPS", 2)
    monkeypatch.setattr(demo, "memory_table", lambda *shapes: f"memory of {shapes}")


@pytest.mark.long
def test_the_whole_way(quick, tmp_path):
    screen = io.StringIO()
    result = demo.run_demo(tmp_path / "out", plan=TINY, console=Console(file=screen, width=120))
    assert set(result.dice) == set(phantom.NAMES[1:])
    assert result.steps == 2
    unseen = nib.load(tmp_path / "out/phantoms/imagesTs/phantom_003_0000.nii.gz")
    labels = nib.load(result.segmentation)
    assert labels.shape == unseen.shape == TINY.shape
    np.testing.assert_allclose(labels.affine, unseen.affine)
    assert result.overlay.stat().st_size > 10_000
    assert (result.run / "progress.csv").is_file()
    printed = screen.getvalue()
    for expected in ("urinary_bladder", "Mean Dice", str(result.segmentation)):
        assert expected in printed
    assert "memory of ((32, 24, 24), (512, 512, 512))" in printed
    (case,) = result.summary["metric_per_case"]
    assert case["prediction_file"] == str(result.segmentation)

    again = demo.run_demo(tmp_path / "out", plan=TINY)  # replaces the first, prints nothing
    np.testing.assert_equal(again.dice, result.dice)


def test_the_unseen_phantom_neither_trains_nor_validates(quick, tmp_path, monkeypatch):
    class Trained(Exception):
        pass

    def train(config, **options):
        raise Trained(config)

    monkeypatch.setattr("effseg.training.train", train)
    with pytest.raises(Trained) as stop:
        demo.run_demo(tmp_path, plan=TINY, seed=5)
    config = stop.value.args[0]
    assert config.cases == "phantom_000,phantom_001,phantom_002"
    assert config.validation == "phantom_002"
    assert (config.device, config.seed, config.steps) == ("cpu", 5, 2)
    written = np.asarray(nib.load(tmp_path / "phantoms/imagesTs/phantom_003_0000.nii.gz").dataobj)
    np.testing.assert_array_equal(written, phantom.generate(TINY.shape, seed=8)[0])


def test_steps_that_fit(monkeypatch):
    clock = iter(np.arange(0, 100, 0.4))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(clock)))
    assert demo.affordable_steps(100, (16, 16, 16)) == 250  # at 0.4 s a step
    assert demo.affordable_steps(3600, (16, 16, 16)) == demo.MOST_STEPS
    assert demo.affordable_steps(1, (16, 16, 16)) == demo.FEWEST_STEPS


@pytest.mark.slow
def test_memory_against_the_baseline():
    size, base, baseline, share = (list(column.cells) for column in demo.memory_table((96, 96, 96)).columns)
    assert size == ["96x96x96", "parameters"]
    assert (base[1], baseline[1]) == ("1.76 M", "19.07 M")
    assert float(share[1].rstrip("%")) < 9.5
    assert float(share[0].rstrip("%")) < 12


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_minutes(tmp_path, minutes):
    with pytest.raises(InputError, match="minutes: expected more than 0"):
        demo.run_demo(tmp_path / "out", minutes=minutes)
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(demo, "run_demo", lambda *arguments, console: called.append(arguments))
    assert main(["demo", "--output", str(tmp_path), "--minutes", "2", "--seed", "4"]) == 0
    assert called == [(tmp_path, 2.0, 4)]


def test_command_with_a_file_for_output(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("effseg: error: ")
    assert "file" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_learns_every_organ(tmp_path):
    result = demo.run_demo(tmp_path / "out", seed=1)
    assert result.mean_dice >= 0.75
    assert min(result.dice.values()) > 0.2
