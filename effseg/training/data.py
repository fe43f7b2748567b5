"""The cases of a run: found, checked, prepared once, and counted."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch

from effseg.data.augmentation import Augmentation, augmentation
from effseg.data.cache import CachedCase, WholeCase, prepare_case, prepare_whole_case
from effseg.data.cases import Case, Found, describe_missing, look_for_cases
from effseg.data.dataset_json import read_dataset_json
from effseg.data.description import same_text
from effseg.data.identity import case_identity
from effseg.data.intensities import listed, scaling
from effseg.data.labels import LabelMap, label_names, load_label_map
from effseg.data.mirroring import Pairs, described_pairs, mirror_pairs
from effseg.data.preprocessing import Preprocessing
from effseg.data.selection import select_names, selects_by_name
from effseg.data.splits import SPLITS, fold_names, split_cases
from effseg.errors import DamagedFile, InputError
from effseg.training.config import TrainingConfig
from effseg.training.distributed import World
from effseg.training.runs import (
    RunRecord,
    check_labels,
    check_preprocessing,
    read_record,
    recorded_split,
    twins,
)

SAY_EVERY = 10.0  # seconds
MOST_NOTES = 10

Prepared = TypeVar("Prepared")


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a run learns from. augment is None where the configuration wants no augmentation. record: what
    the run's folder is to say of it, resumed: what it says already, None for a run that begins."""

    label_map: LabelMap
    preprocessing: Preprocessing
    training: list[CachedCase]
    validation: list[WholeCase]
    augment: Augmentation | None
    record: RunRecord
    resumed: RunRecord | None = None

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

    @cached_property
    def validated(self) -> tuple[bool, ...]:
        """Of every organ, whether a validation case shows it; of all of them, where none shows any."""
        found = np.zeros(len(self.organs), bool)
        for case in self.validation:
            for plane in case.labels:
                counts = np.bincount(plane.ravel(), minlength=self.label_map.num_classes)
                found |= counts[1 : self.label_map.num_classes] > 0
        return tuple((found if found.any() else ~found).tolist())

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


def load_training_data(
    config: TrainingConfig, world: World, say: Callable[[str], None], anew: bool = False
) -> TrainingData:
    """Find, check and prepare the cases of `config`; the processes of `world` share the work.

    A run that is continued keeps the cases and the split that its folder records, unless it begins `anew`.
    say: is told how far a long preparation is, and of what is left out.
    Raises InputError for data that cannot be trained on: no cases, a label map without an organ, files that
    are missing or do not fit together, sizes that do not agree in a batch, a patch larger than a volume; and
    for data that has changed since the run began.
    """
    label_map = load_label_map(config.data, config.labels)
    mirror = _mirror(config, label_map)
    resumed = None if anew else world.from_main(lambda: read_record(config.output))
    if resumed is not None:
        check_labels(resumed, label_map, mirror, config)
    parts = world.from_main(lambda: split(config, say, anew))
    preprocessing = _preprocessing(config, say)
    if resumed is not None:
        check_preprocessing(resumed, preprocessing, config)
    how: dict[str, Any] = {
        "preprocessing": preprocessing,
        "label_map": label_map,
        "folder": config.cache or config.output / "cache",
    }
    known = {} if resumed is None else {same_text(name): files for name, files in resumed.files.items()}
    training, files = _prepare(parts[0], partial(prepare_case, **how), known, config, world, say)
    validation, others = _prepare(parts[1], partial(prepare_whole_case, **how), known, config, world, say)
    if not training:
        raise InputError(f"{config.data}: no case is left to train on")
    cases: list[CachedCase | WholeCase] = [*training, *validation]
    _tell([note for case in cases for note in case.notes], say)
    data = TrainingData(
        label_map,
        preprocessing,
        training,
        validation,
        _augmentation(mirror, config, world.device) if config.augment else None,
        resumed or RunRecord(label_map, preprocessing, tuple(files), tuple(others), files | others, mirror),
        resumed,
    )
    _check(data, config)
    for one, other in twins(data.record):
        say(f"validation case {one} is the same scan as training case {other}: its score is no proof")
    return data


def _augmentation(mirror: Pairs | None, config: TrainingConfig, device: torch.device) -> Augmentation:
    on_device, whole = config.augments_on(device), config.patch_size is None
    return augmentation(mirror, config.augment_strength, on_device, shifts=whole)


def _mirror(config: TrainingConfig, label_map: LabelMap) -> Pairs | None:
    """The pairs of classes that mirrored volumes exchange; None where none is mirrored."""
    if config.mirror == "none":
        return None
    if config.mirror_pairs is not None:
        return mirror_pairs(label_map.names, config.mirror_pairs, None)
    left_out = label_names(config.data).difference(label_map.names)
    return mirror_pairs(label_map.names, None, described_pairs(config.data), left_out)


def split(
    config: TrainingConfig, say: Callable[[str], None] = lambda text: None, anew: bool = False
) -> tuple[list[Case], list[Case]]:
    """The training and the validation cases: those of the run that `config.output` holds, unless another one
    begins `anew`, or else those that `config` names.

    say: is told of what is left out. Raises InputError where a part is empty, a case of the run is gone or
    has changed, or something is missing of what belongs to a new one's cases, unless `config.allow_missing`.
    """
    record = None if anew else read_record(config.output)
    return _deal(config, say) if record is None else recorded_split(record, config, say)


def _deal(config: TrainingConfig, say: Callable[[str], None]) -> tuple[list[Case], list[Case]]:
    """The cases of a new run."""
    found = look_for_cases(config.data, labelled=True)
    cases, missing = {case.name: case for case in found.cases}, _with_gone(config, found)
    names = [*cases, *missing]
    chosen = select_names(names, config.cases)
    held_out = [] if config.validation is None else select_names(names, config.validation)
    lacking = {name: missing[name] for name in dict.fromkeys([*chosen, *held_out]) if name in missing}
    if found.fewer and not selects_by_name(names, config.cases):
        lacking[""] = found.fewer
    if lacking and not config.allow_missing:
        raise InputError(f"{describe_missing(lacking)} (--allow-missing goes on without)")
    if lacking:
        say(f"goes on without: {describe_missing(lacking)}")
    usable = [cases[name] for name in chosen if name in cases]
    validation = [cases[name] for name in held_out if name in cases]
    if config.validation is not None:
        training = [case for case in usable if case not in validation]
    elif config.fold == "all":
        training = usable
    else:
        training, validation = split_cases(config.data, usable, config.fold or 0)
    if not training:
        raise InputError(f"{config.data}: no case is left to train on, {len(validation)} validate")
    if not validation and config.fold != "all":
        raise InputError(f"{config.data}: no case is left to validate on; fold 'all' trains without")
    return training, validation


def _with_gone(config: TrainingConfig, found: Found) -> dict[str, str]:
    """What is missing, with the cases that only splits_final.json knows."""
    uses_folds = config.validation is None and config.fold != "all"
    parts = fold_names(config.data, config.fold or 0) if uses_folds else None
    missing = found.missing | found.unpaired
    known = {same_text(name) for name in (*missing, *(case.name for case in found.cases))}
    gone = [name for part in parts or () for name in part if same_text(name) not in known]
    return missing | {name: f"{SPLITS}: case {name!r} of the fold is not there" for name in gone}


def _preprocessing(config: TrainingConfig, say: Callable[[str], None]) -> Preprocessing:
    """What `config` says; one window is that of the CT channels, others are scaled as their names say."""
    preprocessing = Preprocessing(
        window=config.window, spacing=config.spacing, crop=config.crop, margin=config.margin
    )
    names = read_dataset_json(config.data).channels
    if names is None:
        return preprocessing
    windows = preprocessing.windows(len(names))
    window = windows[0]
    if isinstance(window, tuple) and preprocessing.window == window:  # one for all
        windows = tuple(scaling(name, window) for name in names)
        if window not in windows and window != Preprocessing().window:
            raise InputError(f"window: expected none, as no channel is CT ({', '.join(names)}), got {window}")
    if all(isinstance(window, tuple) for window in windows):
        return preprocessing
    say(f"channels {', '.join(names)}: {listed(windows)}")
    return replace(preprocessing, window=windows)


def _prepare(
    cases: list[Case],
    prepare: Callable[..., Prepared],
    known: Mapping[str, Any],
    config: TrainingConfig,
    world: World,
    say: Callable[[str], None],
) -> tuple[list[Prepared], dict[str, Any]]:
    """What `prepare` makes of the cases, and their `case_identity` by name, both in order; without damaged
    ones where `config.allow_missing`. known: identities by `same_text`; other cases' files are read for it by
    one process."""
    mine, errors = world.share(cases), []
    damaged: list[tuple[str, str]] = []
    found: list[tuple[str, Any]] = []
    said = time.monotonic()
    for number, case in enumerate(mine, start=1):
        try:
            identity = known.get(same_text(case.name)) or case_identity(case)
            prepare(case, identity=identity)
            found.append((case.name, identity))
        except DamagedFile as error:
            damaged.append((case.name, str(error)))
        except InputError as error:
            errors.append(str(error))
            break
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say(f"prepared {number} of {len(mine)} cases")
    world.fail_together(errors)
    lost = dict(world.gather(damaged))
    if lost and not config.allow_missing:
        raise InputError(f"{describe_missing(lost)} (--allow-missing goes on without)")
    if lost:
        say(f"goes on without: {describe_missing(lost)}")
    by_name = dict(world.gather(found))
    files = {case.name: by_name[case.name] for case in cases if case.name not in lost}
    return [prepare(case, identity=files[case.name]) for case in cases if case.name in files], files


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
