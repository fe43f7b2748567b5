"""Operators that a step launches on a GPU, and those for which its host waits: see launches.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

FILE = Path(__file__).with_name("launches.py")
lacking = not hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
pytestmark = pytest.mark.skipif(lacking, reason=f"torch {torch.__version__} cannot pretend to have a GPU")


def count(*arguments):
    done = subprocess.run(
        [sys.executable, str(FILE), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def small():
    return count("32x64x64", "raw,stream")


# A small volume's step in slabs that hold all of every level, where raw has 23 convolutions and their
# normalisations, and in the 16 slabs of four rows that its finest level has in stream.
@pytest.mark.parametrize(("memory", "most"), [("raw", 2100), ("stream", 4500)])
@pytest.mark.long
def test_a_small_step(small, memory, most):
    found = small[memory]
    assert found["syncs"] == []
    assert found["launching"] <= most, found["often"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["512x512x256", "256x512x512"])
@pytest.mark.parametrize(("memory", "most"), [("raw", 12_000), ("stream", 13_000)])
def test_a_step_on_a_card_of_24_gb(memory, most, size):
    found = count(size, memory, "24GB")[memory]
    assert found["syncs"] == []
    assert found["launching"] <= most, found["often"]
