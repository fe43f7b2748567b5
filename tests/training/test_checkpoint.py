import pytest
import torch
from torch import nn

from effseg.errors import InputError
from effseg.training.checkpoint import Checkpoints, load_checkpoint


class Model(nn.Linear):
    def save(self, path, extra=None):
        from safetensors.torch import save_file

        save_file(self.state_dict(), path)


class Full(Model):
    def save(self, path, extra=None):
        path.write_bytes(b"half")
        raise OSError("No space left on device")


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def test_comes_back_as_it_was(checkpoints):
    model = Model(3, 2)
    state = {"run": {"step": 7, "best": [0.5, float("nan")]}, "moments": [torch.randn(4)]}
    path = checkpoints.save(7, model, state, {})
    assert path.name == "step-00000007"
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "state.pt"]
    other = Model(3, 2)
    loaded = load_checkpoint(checkpoints.newest(), other)
    assert torch.equal(other.weight, model.weight)
    assert loaded["run"]["step"] == 7
    assert torch.equal(loaded["moments"][0], state["moments"][0])


def test_only_the_newest_stays(checkpoints):
    for step in (5, 10, 15):
        checkpoints.save(step, Model(3, 2), {}, {})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000015"]


def test_a_failed_write_leaves_the_older_one_alone(checkpoints):
    checkpoints.save(5, Model(3, 2), {}, {})
    with pytest.raises(InputError, match="step-00000010: cannot be written: No space"):
        checkpoints.save(10, Full(3, 2), {}, {})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000005"]


def test_leftovers_of_a_kill_are_neither_used_nor_kept(checkpoints):
    checkpoints.save(10, Model(3, 2), {}, {})
    (checkpoints.folder / "step-00000005").mkdir()
    (checkpoints.folder / ".writing-step-00000015").mkdir()
    assert checkpoints.newest().name == "step-00000010"
    checkpoints.clean()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000010"]


def test_none_there(checkpoints):
    checkpoints.clean()
    assert checkpoints.newest() is None


def test_unreadable_or_foreign_is_one_clear_line(checkpoints):
    path = checkpoints.save(5, Model(3, 2), {}, {})
    with pytest.raises(InputError, match="step-00000005"):
        load_checkpoint(path, Model(4, 2))
    (path / "state.pt").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="step-00000005") as error:
        load_checkpoint(path, Model(3, 2))
    assert "\n" not in str(error.value)
