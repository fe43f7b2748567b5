"""A run's best network so far, as its own file tells."""

import math
from pathlib import Path

from effseg.errors import InputError
from effseg.models.checkpoint import read


def best_so_far(folder: Path, organs: int) -> tuple[int, list[float]]:
    """Step of the network in `folder`/best.safetensors and its Dice by organ; (0, []) where none is.

    The file is written before the checkpoint that remembers it, and a kill in between leaves it alone: so it,
    and no checkpoint, is asked. Raises InputError where it does not tell, or of another number of organs.
    """
    path = folder / "best.safetensors"
    if not path.is_file():
        return 0, []
    told = read(path)[0]["extra"].get("training", {})
    step, dice = told.get("step"), told.get("dice")
    if not isinstance(step, int) or not isinstance(dice, dict) or len(dice) != organs:
        raise InputError(
            f"{path}: expected this run's best network, which tells its step and the Dice of {organs} "
            "organs: remove it to go on without"
        )
    return step, [math.nan if value is None else float(value) for value in dice.values()]
