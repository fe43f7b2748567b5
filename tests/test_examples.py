"""The programs in effseg.examples run."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from effseg import cli
from effseg.commands import nnunet, nnunet_predict


def test_whole_ct(monkeypatch, capsys):
    from effseg.examples import whole_ct

    monkeypatch.setattr(whole_ct, "SHAPE", (24, 16, 24))
    monkeypatch.setattr(whole_ct, "CASES", 2)
    monkeypatch.setattr(whole_ct, "STEPS", 2)
    whole_ct.main()
    out = capsys.readouterr().out
    assert out.count("voxels, loss ") == 2
    assert "mean Dice on an unseen phantom: 0." in out


def test_planning_memory(small_preset, monkeypatch, capsys):
    from effseg.examples import planning_memory

    monkeypatch.setattr(planning_memory, "PRESET", small_preset)
    monkeypatch.setattr(planning_memory, "SHAPE", (1, 1, 64, 64, 64))
    monkeypatch.setattr(planning_memory, "MODES", planning_memory.MODES[:1])
    monkeypatch.setattr(planning_memory, "BUDGETS", ("24GB",))
    planning_memory.main()
    heading, raw, auto = capsys.readouterr().out.splitlines()
    assert heading.startswith("one training step on 64x64x64, 15 classes")
    assert "memory=raw" in raw
    assert "B/voxel in tensors; peak in " in raw
    assert auto.startswith("  auto, 24GB: raw")
    assert auto.endswith(" 1.00x the arithmetic")


def test_nnunet_training_gives_commands_that_there_are(tmp_path):
    from effseg.examples import nnunet_training

    commands = nnunet_training.steps(tmp_path, tmp_path / "found")
    for command in commands:
        arguments = cli._parser(command[:1]).parse_args(command)
        assert arguments.action in nnunet.ACTIONS
    given = nnunet_predict._parser().parse_args(commands[-1][2:])
    assert given.i == tmp_path / "imagesTs"
    assert set(nnunet.FOLDERS) <= set(nnunet_training.settings(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nnunetv2") is None, reason="nnU-Net is not installed")
def test_nnunet_training(tmp_path, monkeypatch, capsys):
    from effseg.examples import nnunet_training

    with_nnunet = Path(__file__).with_name("with_nnunet.py")
    start = nnunet_training.subprocess.run

    def run(command, **options):
        return start([command[0], str(with_nnunet), *command[3:]], **options)

    monkeypatch.setattr(nnunet_training.subprocess, "run", run)
    for name, value in (("EPOCHS", "1"), ("ITERATIONS", "2")):
        given = nnunet_training.settings(tmp_path) | {f"EFFSEG_NNUNET_{name}": value}
        monkeypatch.setattr(nnunet_training, "settings", lambda folder, given=given: given)
    nnunet_training.main(tmp_path)
    assert "mean Dice on an unseen phantom: 0." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MONAI's and ignite's own
def test_monai_training(monkeypatch, capsys):
    from effseg.examples import monai_training

    monkeypatch.setattr(monai_training, "SHAPE", (16, 16, 16))
    monkeypatch.setattr(monai_training, "CASES", 2)
    monkeypatch.setattr(monai_training, "EPOCHS", 2)
    monai_training.main()
    out = capsys.readouterr().out
    assert "BasicUNet on 1x1x64x64x64" in out
    assert "mean Dice before: " in out
    assert "after 2 more: " in out
