"""A network of whole volumes, as nnU-Net's own predictor calls it: on a window and without labels."""

import subprocess
import sys

import pytest
import torch

from effseg.errors import InputError
from effseg.nnunet.network import WholeVolumeNet

PROGRAM = """
import torch
from effseg.nnunet.network import WholeVolumeNet
WholeVolumeNet(1, 2, preset="tiny")(torch.zeros(1, 1, 8, 8, 8))
"""


def test_it_is_bad_input_to_those_who_catch_it():
    with pytest.raises(InputError, match="effseg nnunet predict") as error:
        WholeVolumeNet(1, 2, preset="tiny")(torch.zeros(1, 1, 8, 8, 8))
    assert isinstance(error.value, Exception)


@pytest.mark.long
def test_it_ends_a_program_with_one_line():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("this network was trained on whole volumes")
