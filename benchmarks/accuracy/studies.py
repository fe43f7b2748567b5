"""What is compared on which patients: phantoms, and head-and-neck CT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effseg import phantom
from effseg.data.cases import Case
from effseg.data.splits import FOLDS, split_cases
from effseg.errors import InputError

Triple = tuple[int, int, int]
SEARCH = "search"
"""The fold on which learning rates are chosen."""


@dataclass(frozen=True)
class Fold:
    """Names of the cases that train, and of those that are scored."""

    training: tuple[str, ...]
    scored: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """size: a typical volume's, by which nnU-Net's network is planned. patch_size: of contenders on patches.
    options: of `TrainingConfig`, the same for all contenders; patch_options: instead, for those on patches,
    where a patch would not fit otherwise. folds: SEARCH, whose scores are not reported,
    and the others. rates: the learning rates of the search, tried for search_steps; more_rates: how many it
    may add, each half the lowest or twice the highest while that is the best. validations: how many
    times a run scores its patients on the way, for learning curves; its processor time is without them."""

    name: str
    title: str
    data: Path
    size: Triple
    patch_size: Triple
    folds: Mapping[str, Fold]
    contenders: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    patch_options: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (3e-3, 6e-3, 12e-3)
    more_rates: int = 3
    search_steps: int = 200  # after 60, EffSegNet base is best with half the rate that is best after 200
    search_seed: int = 100
    validations: int = 0


TRAINING, SEARCHED, SCORED = 40, 4, 16
"""Phantoms, in this order; the first ones are those of `effseg demo`."""


def phantoms(
    folder: Path, shape: Triple = (64, 48, 48), counts: Triple = (TRAINING, SEARCHED, SCORED)
) -> Study:
    """Those of `effseg demo`, written to `folder` where they are not there yet; more of them are scored.

    Not cropped to the body, so that all have one size, which suits the strides of every contender. Not
    augmented, as in the demonstration: every phantom is another body already.
    """
    data = folder / f"phantoms-{'x'.join(map(str, shape))}-{sum(counts)}"
    if not (data / "dataset.json").exists():  # it is written last
        phantom.write_dataset(data, sum(counts), shape, unseen=0)
    names = [f"phantom_{number:03d}" for number in range(sum(counts))]
    first, second = counts[0], counts[0] + counts[1]
    training = tuple(names[:first])
    return Study(
        name="phantoms",
        title=f"phantoms of {'x'.join(map(str, shape))} voxels, {counts[0]} train and {counts[2]} are scored",
        data=data,
        size=shape,
        patch_size=(min(shape[0], 32), min(shape[1], 32), min(shape[2], 32)),
        folds={
            SEARCH: Fold(training, tuple(names[first:second])),
            "0": Fold(training, tuple(names[second:])),
        },
        contenders=("effseg-base", "nnunet", "unet3d"),
        options={"augment": False, "crop": "none"},
    )


def openkbp(data: Path) -> Study:
    """Head-and-neck CT, 7 organs: case001-016 train and 017-020 are scored, and five folds of 001-020.

    The search trains on 001-012 and scores 013-016, so it has seen nothing of 017-020; of the five folds'
    patients it has.
    """
    names = [f"case{number:03d}" for number in range(1, 21)]
    folds = {SEARCH: Fold(tuple(names[:12]), tuple(names[12:16])), "held": _fold(names[:16], names[16:])}
    cases = [Case(name, ()) for name in names]
    for number in range(FOLDS):
        parts = split_cases(data, cases, number)
        folds[str(number)] = _fold(*([case.name for case in part] for part in parts))
    return Study(
        name="openkbp",
        title="openkbp, head and neck, 7 organs",
        data=data,
        size=(128, 64, 128),
        patch_size=(64, 64, 64),
        folds=folds,
        contenders=(
            "effseg-base", "effseg-large", "effseg-base-patches", "nnunet", "nnunet-patches", "unet3d",
            "unet3d-patches",
        ),
        options={"labels": "openkbp"},
        patch_options={"margin": 35.0},  # mm of air: some bodies are 57 voxels deep
        validations=5,
    )  # fmt: skip


def _fold(training: list[str], scored: list[str]) -> Fold:
    return Fold(tuple(training), tuple(scored))


def study(name: str, data: Path | None, scratch: Path) -> Study:
    """Raises InputError for an unknown study, or data that it does not want or lacks."""
    if name == "phantoms":
        if data is not None:
            raise InputError(f"--data: expected none for phantoms, which are made, got {data}")
        return phantoms(scratch)
    if name == "openkbp":
        if data is None or not data.is_dir():
            raise InputError(f"--data: expected the folder of openkbp's cases, got {data}")
        return openkbp(data)
    raise InputError(f"study: expected phantoms or openkbp, got {name!r}")
