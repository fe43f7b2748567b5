"""Which cases train and which validate, as nnU-Net splits them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effseg.data.cases import Case
from effseg.data.description import read_json, same_text
from effseg.data.listing import is_there
from effseg.errors import InputError

FOLDS = 5
SPLIT_SEED = 12345  # both are nnU-Net's
SPLITS = "splits_final.json"


def split_cases(
    folder: str | Path, cases: Sequence[Case], fold: int | str = 0
) -> tuple[list[Case], list[Case]]:
    """Training and validation cases of one fold, as nnU-Net splits them.

    From `folder`/splits_final.json where it is, else 5 folds, shuffled with the seed 12345. The fold "all"
    trains and validates on every case. Raises InputError where there is no such fold, a case is in neither
    part, or a part is empty.
    """
    cases = sorted(cases, key=lambda case: case.name)
    if fold == "all":
        return cases, list(cases)
    path = Path(folder) / SPLITS
    parts = fold_names(folder, fold)
    if parts is None:
        parts = _chosen(_five_folds([case.name for case in cases]), fold)
    training, validation = (set(map(same_text, part)) for part in parts)
    for case in cases:
        name = same_text(case.name)
        if (name in training) == (name in validation):
            where = "both parts" if name in training else "neither part"
            raise InputError(f"{path}: case {case.name!r} is in {where} of fold {fold}")
    chosen = (
        [case for case in cases if same_text(case.name) in training],
        [case for case in cases if same_text(case.name) in validation],
    )
    if not all(chosen):
        raise InputError(
            f"{path}: none of the cases is in the {'validation' if chosen[0] else 'training'} part"
        )
    return chosen


def fold_names(folder: str | Path, fold: int | str) -> tuple[list[str], list[str]] | None:
    """Training and validation cases of a fold as `folder`/splits_final.json names them; None without it."""
    path = Path(folder) / SPLITS
    return _chosen(_read_splits(path), fold) if is_there(path) else None


def _chosen(splits: Sequence[Any], fold: int | str) -> Any:
    if not str(fold).isdigit() or int(fold) >= len(splits):
        raise InputError(f"fold: expected 0 to {len(splits) - 1} or all, got {fold}")
    return splits[int(fold)]


def _read_splits(path: Path) -> list[tuple[list[str], list[str]]]:
    splits = read_json(path)
    try:
        parts = [(split["train"], split["val"]) for split in splits]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a list of objects with train and val: {error}") from error
    for names in (names for pair in parts for names in pair):
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise InputError(f"{path}: expected a list of objects with train and val, lists of names")
    return parts


def _five_folds(names: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """scikit-learn's KFold(n_splits=5, shuffle=True, random_state=12345) on the sorted names."""
    if len(names) < FOLDS:
        raise InputError(f"expected at least {FOLDS} cases for {FOLDS} folds, found {len(names)}")
    shuffled = np.arange(len(names))
    np.random.RandomState(SPLIT_SEED).shuffle(shuffled)
    held_out = [set(part.tolist()) for part in np.array_split(shuffled, FOLDS)]
    return [
        (
            [name for index, name in enumerate(names) if index not in part],
            [name for index, name in enumerate(names) if index in part],
        )
        for part in held_out
    ]
