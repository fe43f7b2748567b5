import json
import multiprocessing
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from effseg import phantom
from effseg.training import TrainingConfig, train
from effseg.training.checkpoint import Checkpoints
from effseg.training.records import read_rows


@pytest.fixture(scope="module")
def context():
    """Starts fresh processes that have imported the package already: a kill then costs no imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["effseg.training", "torch._dynamo", "matplotlib.figure"])
    return context


def start(context, data, run, steps):
    config = TrainingConfig(
        data=data,
        output=run,
        model="effseg-tiny",
        crop="none",
        validation="phantom_000",
        steps=steps,
        validation_interval=20,
        checkpoint_interval=1,  # much of the time is spent in writing one, so that many kills hit it
    )
    process = context.Process(target=train, args=(config,))
    process.start()
    return process


def finish(process):
    process.join(timeout=1500)
    assert process.exitcode == 0


def wait_for(process, condition):
    """Until `condition` holds; False when the process ended before."""
    while process.is_alive():
        if condition():
            return True
        time.sleep(0.001)
    return False


def check_kills(context, tmp_path, kills, steps, seed):
    data = phantom.write_dataset(tmp_path / "data", cases=4, shape=(20, 16, 12), seed=0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(context, data, whole, steps))
    rng = random.Random(seed)
    checkpoints = Checkpoints(killed / "checkpoints")
    for kill in range(kills):
        before = checkpoints.newest()
        process = start(context, data, killed, steps)
        ended = "the run ended before its kill: give it more steps"
        assert wait_for(process, lambda before=before: checkpoints.newest() != before), ended
        if kill % 2 == 0:  # while a checkpoint is being written, or the older one removed
            assert wait_for(process, lambda: len(list(checkpoints.folder.iterdir())) > 1), ended
            time.sleep(rng.uniform(0.0, 0.02))
        else:
            time.sleep(rng.uniform(0.0, 0.25))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, ended
        newest = checkpoints.newest()
        state = torch.load(newest / "state.pt", weights_only=True)
        assert state["run"]["step"] == int(newest.name.removeprefix("step-"))
        load_file(newest / "model.safetensors")
    finish(start(context, data, killed, steps))
    assert_same_runs(whole, killed, steps)


def assert_same_runs(whole, killed, steps):
    expected, got = (read_rows(run / "progress.csv") for run in (whole, killed))
    for row in expected + got:
        del row["seconds"]
    assert [int(row["step"]) for row in expected] == list(range(1, steps + 1))
    assert got == expected
    for name in ("final", "best"):
        weights = [load_file(run / f"{name}.safetensors") for run in (whole, killed)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert [path.name for path in (killed / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert not list(killed.rglob(".writing-*"))


@pytest.mark.slow
def test_killed_and_continued_runs_end_like_an_uninterrupted_one(context, tmp_path):
    check_kills(context, tmp_path, kills=2, steps=20, seed=0)


@pytest.mark.slow
def test_twenty_kills(context, tmp_path):
    check_kills(context, tmp_path, kills=20, steps=160, seed=1)


@pytest.mark.slow
def test_twenty_kills_at_any_moment(context, tmp_path):
    """From the first file on: whatever a kill leaves is readable, and the same command goes on with it."""
    steps = 12
    data = phantom.write_dataset(tmp_path / "data", cases=4, shape=(20, 16, 12), seed=0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    finish(start(context, data, whole, steps))
    longest = (time.monotonic() - began) / 3
    rng = random.Random(2)
    for _ in range(20):
        process = start(context, data, killed, steps)
        process.join(timeout=rng.uniform(0.0, longest))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        for name in ("config.json", "data.json"):
            if (killed / name).exists():
                json.loads((killed / name).read_text(encoding="utf-8"))
        assert (killed / "data.json").exists() or not (killed / "config.json").exists()
        newest = Checkpoints(killed / "checkpoints").newest()
        if newest is not None:
            torch.load(newest / "state.pt", weights_only=True)
            load_file(newest / "model.safetensors")
    finish(start(context, data, killed, steps))
    assert_same_runs(whole, killed, steps)
