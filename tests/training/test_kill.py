import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from effseg import phantom
from effseg.training.checkpoint import Checkpoints
from effseg.training.records import read_rows


def start(data, run, steps):
    command = [sys.executable, "-m", "effseg", "train", "--data", str(data), "--output", str(run)]
    command += ["--model", "effseg-tiny", "--crop", "none", "--validation", "phantom_000"]
    # A checkpoint a step: much of the time is spent in writing one, so that many kills hit it.
    command += ["--steps", str(steps), "--validation-interval", "7", "--checkpoint-interval", "1"]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def wait_for_a_step(process, checkpoints):
    """Until the process has done a step more; False when it ended before."""
    before = checkpoints.newest()
    while process.poll() is None:
        if checkpoints.newest() != before:
            return True
        time.sleep(0.005)
    return False


def check_kills(tmp_path, kills, steps, seed):
    data = phantom.write_dataset(tmp_path / "data", cases=4, shape=(20, 16, 12), seed=0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(data, whole, steps))
    rng, done = random.Random(seed), 0
    checkpoints = Checkpoints(killed / "checkpoints")
    while done < kills:
        process = start(data, killed, steps)
        assert wait_for_a_step(process, checkpoints), process.communicate()[1]
        time.sleep(rng.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before its kill: give it more steps"
        done += 1
        newest = checkpoints.newest()
        state = torch.load(newest / "state.pt", weights_only=True)
        assert state["run"]["step"] == int(newest.name.removeprefix("step-"))
        load_file(newest / "model.safetensors")
    finish(start(data, killed, steps))

    expected, got = (read_rows(run / "progress.csv") for run in (whole, killed))
    for row in expected + got:
        del row["seconds"]
    assert got == expected
    for name in ("final", "best"):
        weights = [load_file(run / f"{name}.safetensors") for run in (whole, killed)]
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert [path.name for path in (killed / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert not list(killed.rglob(".writing-*"))


def test_killed_and_continued_runs_end_like_an_uninterrupted_one(tmp_path):
    check_kills(tmp_path, kills=3, steps=24, seed=0)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    check_kills(tmp_path, kills=20, steps=160, seed=1)
