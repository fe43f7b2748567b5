"""Runs on_pretended_device.py in a process of its own: see pretended_device.py."""

import os
import subprocess
import sys
from pathlib import Path

import pretended_device
import pytest

FILE = Path(__file__).with_name("on_pretended_device.py")


@pytest.mark.skipif(pretended_device.missing() is not None, reason=pretended_device.missing() or "")
@pytest.mark.long
def test_steps_on_a_pretended_gpu(pytestconfig: pytest.Config) -> None:
    slow = ["--slow"] if pytestconfig.getoption("--slow") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *slow, str(FILE)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=FILE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
