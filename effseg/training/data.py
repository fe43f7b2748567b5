"""The cases of a run: found, checked, prepared once, and counted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from effseg.errors import InputError
from effseg.training.batches import Augment, PreparedCase
from effseg.training.config import TrainingConfig
from effseg.training.distributed import World
