import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from effseg import phantom
from effseg.errors import InputError
from effseg.training import loop, train
from effseg.training.config import TrainingConfig
from effseg.training.distributed import World, join_world
from effseg.training.records import read_rows

PROGRAM = Path(__file__).with_name("double_run.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def configured(folder, **values):
    return TrainingConfig(
        data=folder / "data",
        model="effseg-tiny",
        crop="none",
        validation="phantom_000-phantom_002",
        validation_interval=2,
        seed=1,
        **values,
    )


def in_two_processes(folder, config):
    path = folder / f"{config.output.name}.json"
    path.write_text(json.dumps(config.to_dict()))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, str(PROGRAM), str(path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    phantom.write_dataset(folder / "data", cases=6, shape=(20, 16, 12), seed=0)
    return folder


@pytest.mark.long
def test_two_processes_equal_one_with_the_whole_batch(folder, monkeypatch):
    build = loop._network
    monkeypatch.setattr(loop, "_network", lambda *arguments: build(*arguments).double())
    runs = [folder / "one", folder / "two"]
    # Instance norm of the single voxel of the deepest level would blow rounding up.
    train(configured(folder, output=runs[0], batch_size=2, steps=4, norm="group"))
    in_two_processes(folder, configured(folder, output=runs[1], batch_size=1, steps=4, norm="group"))
    one, two = (read_rows(run / "progress.csv") for run in runs)
    for name in ("step", "epoch", "learning_rate", "dice_mean", "dice_liver"):
        assert [row[name] for row in one] == [row[name] for row in two]
    for name in ("loss", "gradient_norm"):
        expected = [float(row[name]) for row in one]
        assert [float(row[name]) for row in two] == pytest.approx(expected, rel=1e-6)
    assert one[-1]["dice_mean"]
    again = configured(folder, output=runs[1], steps=4, norm="group")
    train(again.replace(batch_size=2))  # one process sees in a step what two saw
    with pytest.raises(InputError, match="go on with 1 process of batch_size 2, or begin anew"):
        train(again)
    for name in ("final", "best"):
        expected, got = (load_file(run / f"{name}.safetensors") for run in runs)
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            assert (got[key] - value).abs().max() <= 1e-6 * value.abs().max()


def test_shares_items_and_gathers_them_in_order():
    items = list(range(7))
    worlds = [World(rank, 3, torch.device("cpu")) for rank in range(3)]
    assert [world.share(items) for world in worlds] == [[0, 3, 6], [1, 4], [2, 5]]
    alone = World(0, 1, torch.device("cpu"))
    assert alone.gather(alone.share(items)) == items


@pytest.mark.parametrize("device", ["tpu", "meta", "cpu:x"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(InputError, match=r"^device: "), join_world(device):
        pass


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="finds no CUDA GPU"), join_world("cuda"):
        pass


def test_an_error_of_the_first_process_is_everyones(monkeypatch):
    def fail():
        raise InputError("no good")

    sent = []
    monkeypatch.setattr(World, "gather", lambda self, errors: [*errors, *sent])
    first, second = (World(rank, 2, torch.device("cpu")) for rank in range(2))
    with pytest.raises(InputError, match="no good"):
        first.on_main(fail)
    sent.append("no good")
    with pytest.raises(InputError, match="no good"):
        second.on_main(lambda: pytest.fail("only the first process acts"))
