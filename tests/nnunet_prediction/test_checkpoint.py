"""nnU-Net's checkpoints without executing a pickle. Needs no nnU-Net."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from effseg.errors import DamagedFile, InputError
from effseg.nnunet.prediction.checkpoint import read_checkpoint

WEIGHTS = {"conv.weight": torch.arange(6.0).reshape(2, 3)}


def checkpoint(**changes):
    """As nnUNetTrainer.save_checkpoint makes it."""
    return {
        "network_weights": WEIGHTS, "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
        "grad_scaler_state": None, "_best_ema": np.float64(0.5), "current_epoch": 3,
        "logging": {"dice": [np.float32(0.5), [np.int64(1)]], "lr": [0.1], "all": np.array([0.5, np.nan])},
        "init_args": {"configuration": "3d_fullres", "fold": 0, "device": torch.device("cuda")},
        "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": (0, 2),
    } | changes  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint_final.pth"


@pytest.mark.parametrize("archive", [True, False])
def test_what_nnunet_writes_is_read(path, archive):
    torch.save(checkpoint(), path, _use_new_zipfile_serialization=archive)
    found = read_checkpoint(path)
    torch.testing.assert_close(found.weights, WEIGHTS)
    assert (found.trainer, found.configuration, found.mirror_axes) == ("nnUNetTrainer", "3d_fullres", (0, 2))


def test_numbers_of_numpy_1(path):
    torch.save(checkpoint(), path)
    renamed = path.with_name("old.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(renamed, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(name, content)
    torch.testing.assert_close(read_checkpoint(renamed).weights, WEIGHTS)


def test_without_mirroring(path):
    torch.save(checkpoint(inference_allowed_mirroring_axes=None), path)
    assert read_checkpoint(path).mirror_axes == ()


class Command:
    """Pickled, a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, os.mkdir, pickle.loads])
@pytest.mark.parametrize("where", ["logging", "network_weights"])
def test_code_is_refused_and_not_run(path, tmp_path, function, where):
    trap = tmp_path / "trap"
    argument = {os.system: f"touch {trap}", os.mkdir: str(trap), pickle.loads: b"I1\n."}.get(
        function, f"__import__('os').mkdir({str(trap)!r})"
    )
    torch.save(checkpoint(**{where: {"x": Command(function, argument)}}), path)
    with pytest.raises(InputError, match=r"refused: it names [\w.]+, which is none of") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not trap.exists()


def test_objects_are_refused(path):
    torch.save(checkpoint(init_args=Path("x")), path)
    with pytest.raises(InputError, match="refused: it names pathlib"):
        read_checkpoint(path)


def test_arrays_of_objects_hold_no_code(path, tmp_path):
    trap = tmp_path / "trap"
    inside = np.array([Command(os.mkdir, str(trap))], dtype=object)
    torch.save(checkpoint(logging=inside), path)
    with pytest.raises(InputError, match="refused"):
        read_checkpoint(path)
    assert not trap.exists()


@pytest.mark.parametrize("missing", ["network_weights", "trainer_name", "init_args"])
def test_other_checkpoints(path, missing):
    content = checkpoint()
    del content[missing]
    torch.save(content, path)
    with pytest.raises(InputError, match=rf"expected a checkpoint of nnU-Net v2.*without '{missing}'"):
        read_checkpoint(path)


def test_weights_are_tensors(path):
    torch.save(checkpoint(network_weights={"a": 1}), path)
    with pytest.raises(InputError, match="network_weights: expected tensors"):
        read_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_damaged_files(path, share):
    torch.save(checkpoint(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"damaged|refused") as error:
        read_checkpoint(path)
    assert isinstance(error.value, DamagedFile) or "refused" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(path):
    with pytest.raises(InputError, match="no such checkpoint"):
        read_checkpoint(path)
