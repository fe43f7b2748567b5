"""What environment variables set."""

from types import SimpleNamespace

import pytest

from effseg.errors import InputError
from effseg.nnunet import options


def test_memory(monkeypatch):
    monkeypatch.delenv("EFFSEG_MEMORY", raising=False)
    monkeypatch.setenv("EFFSEG_MEMORY_BUDGET", "24GB")
    assert options.memory(("raw", "auto"), "raw") == {"memory": "raw", "memory_budget": None}
    monkeypatch.setenv("EFFSEG_MEMORY", "auto")
    assert options.memory(("raw", "auto"), "raw") == {"memory": "auto", "memory_budget": "24GB"}
    monkeypatch.setenv("EFFSEG_MEMORY", "stream")
    with pytest.raises(InputError, match="EFFSEG_MEMORY: expected one of raw, auto, got 'stream'"):
        options.memory(("raw", "auto"), "raw")


def test_mirror(monkeypatch):
    labels = SimpleNamespace(
        label_dict={"background": 0, "ignore": 3, "Niere li": 1, "Niere re": 2}, ignore_label=3
    )
    for name in ("EFFSEG_MIRROR", "EFFSEG_MIRROR_PAIRS"):
        monkeypatch.delenv(name, raising=False)
    assert options.mirror(labels, {"mirror_pairs": [["Niere li", "Niere re"]]}) is None
    monkeypatch.setenv("EFFSEG_MIRROR", "left-right")
    assert options.mirror(labels, {"mirror_pairs": [["Niere li", "Niere re"]]}) == ((1, 2),)
    with pytest.raises(InputError, match="which labels then change places"):
        options.mirror(labels, {})
    monkeypatch.setenv("EFFSEG_MIRROR_PAIRS", "Niere re:Niere li")
    assert options.mirror(labels, {}) == ((2, 1),)
    monkeypatch.setenv("EFFSEG_MIRROR", "both")
    with pytest.raises(InputError, match="EFFSEG_MIRROR: expected none or left-right, got 'both'"):
        options.mirror(labels, {})


def test_length(monkeypatch):
    trainer = SimpleNamespace(num_epochs=1000, num_iterations_per_epoch=250, num_val_iterations_per_epoch=50)
    monkeypatch.delenv("EFFSEG_NNUNET_ITERATIONS", raising=False)
    monkeypatch.setenv("EFFSEG_NNUNET_EPOCHS", "3")
    options.set_length(trainer)
    assert vars(trainer) == {
        "num_epochs": 3, "num_iterations_per_epoch": 250, "num_val_iterations_per_epoch": 50
    }  # fmt: skip
    monkeypatch.setenv("EFFSEG_NNUNET_ITERATIONS", "4")
    options.set_length(trainer)
    assert (trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (4, 1)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_length_is_a_number(monkeypatch, text):
    monkeypatch.setenv("EFFSEG_NNUNET_EPOCHS", text)
    with pytest.raises(InputError, match="EFFSEG_NNUNET_EPOCHS: expected a number of 1 or more"):
        options.set_length(SimpleNamespace(num_epochs=1))
