"""How often kernels are compiled as volumes change: sizes select no machine code."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own, for kernels here are interpreted: the new specialisations of each volume.
COUNT = """
import json, sys
from functools import partial
import effseg
from effseg.inspection.aot import specialisation
from effseg.kernels.launch import recording
from effseg.memory.predict import peak_training_memory
from effseg.models.levels import PRESETS, Architecture

PRESETS["small"] = Architecture((16, 32), (0, 1))
preset, memory, volumes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
network = partial(effseg.EffSegNet, 1, 15, preset=preset, memory=memory)
known, counts = set(), []
for samples, *size in volumes:
    with effseg.algorithm("triton"), recording("sm_90") as launches:
        peak_training_memory(network, (samples, 1, *size), dtype="bf16", device="cuda")
    found = {specialisation(launch, "sm_90") for launch in launches}
    counts.append(len(found - known))
    known |= found
print(json.dumps(counts))
"""


def compilations(preset: str, memory: str, volumes: list[tuple[int, ...]]) -> list[int]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COUNT, preset, memory, json.dumps(volumes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
def test_a_new_volume_compiles_next_to_nothing():
    """Only the gradient of an upsampling that was cut, for each width; a batch of it nothing."""
    volumes = [(1, 32, 64, 64), (1, 33, 39, 55), (1, 30, 40, 50), (2, 33, 39, 55)]
    first, second, third, batch = compilations("small", "stream", volumes)
    assert 0 < first <= 42
    assert second <= 1
    assert (third, batch) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["stream", "raw"])
def test_three_body_crops_compile_the_kernels_once(memory):
    volumes = [(1, 256, 512, 512), (1, 251, 311, 433), (1, 240, 320, 400)]
    first, second, third = compilations("base", memory, volumes)
    assert first <= 110
    assert second <= 4
    assert third == 0
