"""What can be set from outside: nnU-Net's trainers take no arguments, so it is environment variables.

EFFSEG_MEMORY            the network's memory mode; see the trainers
EFFSEG_MEMORY_BUDGET     for EFFSEG_MEMORY=auto, such as 24GB; default: the GPU's memory
EFFSEG_MIRROR            none (default) or left-right: mirrors every second volume of whole ones
EFFSEG_MIRROR_PAIRS      labels that then change places, A:B,C:D or none; default: dataset.json's
EFFSEG_NNUNET_EPOCHS     number of epochs
EFFSEG_NNUNET_ITERATIONS training steps of an epoch; validation takes a fifth of that, at least one
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from effseg.data.description import MIRROR_PAIRS
from effseg.data.mirroring import Pairs, mirror_pairs
from effseg.errors import InputError

VALIDATION_SHARE = 5  # training steps to one of validation, as in nnU-Net


def memory(known: Sequence[str], default: str) -> dict[str, Any]:
    """Keywords memory and memory_budget. Raises InputError for a mode that is not among the `known`."""
    mode = os.environ.get("EFFSEG_MEMORY") or default
    if mode not in known:
        raise InputError(f"EFFSEG_MEMORY: expected one of {', '.join(known)}, got {mode!r}")
    budget = os.environ.get("EFFSEG_MEMORY_BUDGET") or None
    return {"memory": mode, "memory_budget": budget if mode == "auto" else None}


def mirror(labels: Any, dataset_json: Mapping[str, Any]) -> Pairs | None:
    """The pairs that a mirrored volume exchanges; None where none is mirrored. labels: nnU-Net's manager.

    Raises InputError for a mode that is none, and as `mirror_pairs`.
    """
    mode = os.environ.get("EFFSEG_MIRROR") or "none"
    if mode not in ("none", "left-right"):
        raise InputError(f"EFFSEG_MIRROR: expected none or left-right, got {mode!r}")
    if mode == "none":
        return None
    names = {value: name for name, value in labels.label_dict.items() if value != labels.ignore_label}
    ordered = [names[value] for value in sorted(names)]
    return mirror_pairs(ordered, os.environ.get("EFFSEG_MIRROR_PAIRS"), dataset_json.get(MIRROR_PAIRS))


def set_length(trainer: Any) -> None:
    """A trainer's numbers of epochs and of steps, where they are asked for."""
    trainer.num_epochs = _count("EFFSEG_NNUNET_EPOCHS") or trainer.num_epochs
    iterations = _count("EFFSEG_NNUNET_ITERATIONS")
    if iterations:
        trainer.num_iterations_per_epoch = iterations
        trainer.num_val_iterations_per_epoch = max(1, iterations // VALIDATION_SHARE)


def _count(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{name}: expected a number of 1 or more, got {text!r}")
    return int(text)
