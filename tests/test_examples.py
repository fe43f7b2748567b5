"""The programs in effseg.examples run."""

import pytest


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
