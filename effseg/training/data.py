"""The cases of a run: found, checked, prepared once, and counted."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from effseg.data.augmentation import Augmentation, augmentation
from effseg.data.cache import CachedCase, WholeCase, prepare_case, prepare_whole_case
from effseg.data.cases import Case, find_cases, select_cases, split_cases
from effseg.data.intensities import channel_names, is_ct, listed
from effseg.data.labels import LabelMap, load_label_map
from effseg.data.preprocessing import Preprocessing
from effseg.errors import InputError
from effseg.training.config import TrainingConfig
from effseg.training.distributed import World

SAY_EVERY = 10.0  # seconds
MOST_NOTES = 10


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a run learns from. augment is None where the configuration wants no augmentation."""

    label_map: LabelMap
    preprocessing: Preprocessing
    training: list[CachedCase]
    validation: list[WholeCase]
    augment: Augmentation | None

    @property
    def channels(self) -> int:
        return int(self.training[0].image.shape[0])

    @property
    def organs(self) -> tuple[str, ...]:
        return self.label_map.names[1:]

    @property
    def ignore(self) -> int | None:
        """The class that marks ignored voxels in prepared labels, or None."""
        return self.label_map.ignore_index

    @cached_property
    def counts(self) -> np.ndarray:
        """Voxels of every class in the training cases, (K,)."""
        return np.sum([case.counts for case in self.training], axis=0)

    @property
    def class_weights(self) -> torch.Tensor:
        return class_weights(self.counts)

    @property
    def absent_organs(self) -> list[str]:
        """Organs that no training case shows."""
        return [organ for organ, count in zip(self.organs, self.counts[1:], strict=True) if count == 0]


def class_weights(counts: np.ndarray) -> torch.Tensor:
    """Weights 1/sqrt(frequency) for the cross-entropy, (K,) float32, with a mean of 1 over the voxels.

    counts: (K,) voxels of every class. A class without voxels gets weight 0: no voxel would use it.
    """
    frequency = counts / counts.sum()
    weights = np.zeros(len(counts))
    np.divide(1.0, np.sqrt(frequency), out=weights, where=frequency > 0)
    return torch.from_numpy(weights / (frequency * weights).sum()).float()


def load_training_data(config: TrainingConfig, world: World, say: Callable[[str], None]) -> TrainingData:
    """Find, check and prepare the cases of `config`; the processes of `world` share the work.

    say: is told how far a long preparation is.
    Raises InputError for data that cannot be trained on: no cases, a label map without an organ, files that
    do not fit together, sizes that do not agree in a batch, a patch larger than a volume.
    """
    label_map = load_label_map(config.data, config.labels)
    training, validation = split(config)
    preprocessing = _preprocessing(config, say)
    folder = config.cache or config.output / "cache"
    prepared, whole = _prepare(training, validation, preprocessing, label_map, folder, world, say)
    cases: list[CachedCase | WholeCase] = [*prepared, *whole]
    _tell([note for case in cases for note in case.notes], say)
    data = TrainingData(
        label_map,
        preprocessing,
        prepared,
        whole,
        augmentation(label_map.names) if config.augment else None,
    )
    _check(data, config)
    return data


def split(config: TrainingConfig) -> tuple[list[Case], list[Case]]:
    """The training and the validation cases that `config` names. Raises InputError where one is empty."""
    known = find_cases(config.data, labelled=True)
    cases = select_cases(known, config.cases)
    if config.validation is not None:
        validation = select_cases(known, config.validation)
        training = [case for case in cases if case not in validation]
    elif config.fold == "all":
        training, validation = cases, []
    else:
        training, validation = split_cases(config.data, cases, config.fold or 0)
    if not training:
        raise InputError(f"{config.data}: no case is left to train on, {len(validation)} validate")
    if not validation and config.fold != "all":
        raise InputError(f"{config.data}: no case is left to validate on; fold 'all' trains without")
    return training, validation


def _preprocessing(config: TrainingConfig, say: Callable[[str], None]) -> Preprocessing:
    """What `config` says; one window is that of the CT channels, others by name are standardised."""
    preprocessing = Preprocessing(
        window=config.window, spacing=config.spacing, crop=config.crop, margin=config.margin
    )
    names = channel_names(config.data)
    if names is None:
        return preprocessing
    windows = preprocessing.windows(len(names))
    if preprocessing.window == windows[0]:  # one for all
        windows = tuple(windows[0] if is_ct(name) else None for name in names)
    if None not in windows:
        return preprocessing
    say(f"channels {', '.join(names)}: {listed(windows)}")
    return replace(preprocessing, window=windows)


def _prepare(
    training: list[Case],
    validation: list[Case],
    preprocessing: Preprocessing,
    label_map: LabelMap,
    folder: Path,
    world: World,
    say: Callable[[str], None],
) -> tuple[list[CachedCase], list[WholeCase]]:
    work = [(prepare_case, case) for case in training] + [(prepare_whole_case, case) for case in validation]
    mine, errors = world.share(work), []
    said = time.monotonic()
    for number, (prepare, case) in enumerate(mine, start=1):
        try:
            prepare(case, preprocessing, label_map, folder)
        except InputError as error:
            errors.append(str(error))
            break
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say(f"prepared {number} of {len(mine)} cases")
    world.fail_together(errors)
    return (
        [prepare_case(case, preprocessing, label_map, folder) for case in training],
        [prepare_whole_case(case, preprocessing, label_map, folder) for case in validation],
    )


def _tell(notes: Sequence[str], say: Callable[[str], None]) -> None:
    for note in notes[:MOST_NOTES]:
        say(f"warning: {note}")
    if len(notes) > MOST_NOTES:
        say(f"warning: ... and {len(notes) - MOST_NOTES} more such notes on the cases")


def _check(data: TrainingData, config: TrainingConfig) -> None:
    cases: list[CachedCase | WholeCase] = [*data.training, *data.validation]
    for case in cases:
        if case.image.shape[0] != data.channels:
            raise InputError(
                f"case {case.name}: expected {data.channels} channels like {cases[0].name}, "
                f"got {case.image.shape[0]}"
            )
        patch, size = config.patch_size, case.image.shape[1:]
        if patch is not None and any(wanted > extent for wanted, extent in zip(patch, size, strict=True)):
            raise InputError(
                f"patch_size: expected at most {_size(size)}, the prepared size of case {case.name}, "
                f"got {_size(patch)}"
            )
    if not data.counts[1:].any():
        raise InputError(f"{config.data}: no training case shows any of {', '.join(data.organs)}")
    first = data.training[0]
    if config.batch_size > 1 and config.patch_size is None:
        for case in data.training:
            if case.labels.shape != first.labels.shape:
                raise InputError(
                    f"batch_size: {config.batch_size} needs volumes of one size, but {first.name} is "
                    f"{_size(first.labels.shape)} and {case.name} is {_size(case.labels.shape)} voxels: "
                    "use batch_size 1 or a patch_size"
                )


def _size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
