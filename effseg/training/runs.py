"""What a run was begun with: its cases, how they are split, what their files were, and what is learnt."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effseg.common.atomic import atomic_path
from effseg.data.cases import Case, Found, look_for_cases
from effseg.data.description import read_json, same_text
from effseg.data.identity import case_identity
from effseg.data.labels import LabelMap
from effseg.data.mirroring import Pairs
from effseg.data.preprocessing import Preprocessing
from effseg.data.selection import select_names
from effseg.data.splits import fold_names
from effseg.errors import InputError
from effseg.training.config import TrainingConfig

NAME = "data.json"
FORMAT = 2
ANEW = "begin anew in another output (--init RUN takes its weights over), or with --overwrite in this one"

Split = tuple[list[Case], list[Case]]


@dataclass(frozen=True)
class RunRecord:
    """preprocessing: with what is made of every channel. training, validation: names of cases. files:
    `case_identity` by case. mirror: pairs of classes that mirrored volumes exchange, None without mirroring.
    init: file of the weights it began with, and their checksum; None for random ones. global_batch: cases
    that all processes see in a step; None in records of earlier versions."""

    label_map: LabelMap
    preprocessing: Preprocessing
    training: tuple[str, ...]
    validation: tuple[str, ...]
    files: Mapping[str, Any]
    mirror: Pairs | None = None
    init: Mapping[str, str] | None = None
    global_batch: int | None = None

    def write(self, folder: Path) -> None:
        entries = {
            "format": FORMAT,
            "labels": self.label_map.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
            "training": list(self.training),
            "validation": list(self.validation),
            "mirror": None if self.mirror is None else [list(pair) for pair in self.mirror],
            "init": None if self.init is None else dict(self.init),
            "global_batch": self.global_batch,
            "files": dict(self.files),
        }
        with atomic_path(folder / NAME) as temporary:
            temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> RunRecord | None:
    """Of the run in `folder`; None where none has begun. Raises InputError where it cannot be read, or the
    run began without one, as those of earlier versions did."""
    path = folder / NAME
    if not (folder / "config.json").exists():
        return None  # a record alone was written by a process that was killed before its run began
    if not path.exists():
        raise InputError(
            f"{folder} holds a run of an earlier version, which did not record its cases: {ANEW}"
        )
    entries = read_json(path)
    try:
        mirror, batch = entries["mirror"], entries.get("global_batch")
        if entries["format"] != FORMAT:
            raise ValueError(f"format {entries['format']}")
        return RunRecord(
            LabelMap.from_dict(entries["labels"]),
            Preprocessing.from_dict(entries["preprocessing"]),
            tuple(entries["training"]),
            tuple(entries["validation"]),
            entries["files"],
            None if mirror is None else tuple((int(first), int(second)) for first, second in mirror),
            entries["init"],
            None if batch is None else int(batch),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected a run's record of format {FORMAT}, got: {error!r}") from error


def check_labels(record: RunRecord, now: LabelMap, mirror: Pairs | None, config: TrainingConfig) -> None:
    """Raise InputError unless the classes are those of the run; an organ may have got a new name."""
    before = record.label_map
    where = f"{config.output} holds a run"
    if now.num_classes != before.num_classes:
        raise InputError(
            f"{where} with {before.num_classes} classes ({', '.join(before.names)}), but now there are "
            f"{now.num_classes} ({', '.join(now.names)}): {ANEW}"
        )
    moved = [
        f"{name} was {was} and is {value}"
        for name, was in zip(before.names, before.values, strict=True)
        for other, value in zip(now.names, now.values, strict=True)
        if name == other and was != value
    ]
    if moved or now.values != before.values:
        what = ", ".join(moved) or f"values {_joined(before.values)} are now {_joined(now.values)}"
        raise InputError(f"{where} with another label map: {what}: {ANEW}")
    if now.ignore != before.ignore:
        raise InputError(
            f"{where} with the value {before.ignore} to ignore, but now it is {now.ignore}: {ANEW}"
        )
    if _unordered(mirror) != _unordered(record.mirror):
        names = [_named(pairs, before.names) for pairs in (record.mirror, mirror)]
        raise InputError(f"{where} with mirror pairs {names[0]}, but now they are {names[1]}: {ANEW}")


def check_preprocessing(record: RunRecord, now: Preprocessing, config: TrainingConfig) -> None:
    """Raise InputError unless scans are prepared as in the run; dataset.json may call a channel otherwise."""
    for name, was in record.preprocessing.to_dict().items():
        found = now.to_dict()[name]
        if found != was:
            raise InputError(
                f"{config.output} holds a run with {name} = {was}, but now it is {found}: {ANEW}"
            )


def renamed(record: RunRecord, now: LabelMap) -> dict[str, str]:
    """Organs whose names are others now: {before: now}."""
    return {a: b for a, b in zip(record.label_map.names, now.names, strict=True) if a != b}


def twins(record: RunRecord) -> list[tuple[str, str]]:
    """Validation cases whose scan is that of a training case, with it: copies, or links to one file."""
    return [
        (one, other)
        for one in record.validation
        for other in record.training
        if record.files[one]["images"] == record.files[other]["images"]
    ]


def recorded_split(record: RunRecord, config: TrainingConfig, say: Callable[[str], None]) -> Split:
    """The run's own cases, as they are split in it. `say` is told of cases that have come since.

    Raises InputError where a case is gone or has changed.
    """
    found = look_for_cases(config.data, labelled=True)
    known = {same_text(case.name): case for case in found.cases}
    _check_all_there(record, found, known, config)
    training, validation = (
        [known[same_text(name)] for name in part] for part in (record.training, record.validation)
    )
    changed = [
        f"{name} ({what})"
        for name, was in record.files.items()
        if (what := _difference(was, case_identity(known[same_text(name)])))
    ]
    if changed:
        raise InputError(f"{config.output} holds a run whose cases have changed: {_joined(changed)}: {ANEW}")
    _tell_of_new(record, found, config, say)
    return training, validation


def _check_all_there(
    record: RunRecord, found: Found, known: Mapping[str, Case], config: TrainingConfig
) -> None:
    gone = [name for name in record.files if same_text(name) not in known]
    if not gone:
        return
    reasons = {same_text(name): reason for name, reason in (found.missing | found.unpaired).items()}
    told = [f"{name} ({reasons.get(same_text(name), 'removed')})" for name in gone]
    raise InputError(f"{config.output} holds a run of cases that are gone: {_joined(told)}: {ANEW}")


def _tell_of_new(record: RunRecord, found: Found, config: TrainingConfig, say: Callable[[str], None]) -> None:
    by_fold = config.validation is None and config.validates
    parts = (fold_names(config.data, config.fold or 0) if by_fold else None) or ([], [])
    names = [case.name for case in found.cases]
    known = list(dict.fromkeys([*names, *found.missing, *found.unpaired, *parts[0], *parts[1]]))
    chosen = select_names(known, config.cases)
    if config.validation is not None:
        chosen += select_names(known, config.validation)
    recorded = set(map(same_text, record.files))
    new = [name for name in names if name in chosen and same_text(name) not in recorded]
    if new:
        say(f"cases that came after this run began stay out of it: {_joined(new)}; its split goes on")
    training, validation = (set(map(same_text, part)) for part in parts)
    moved = [name for name in record.training if same_text(name) in validation]
    moved += [name for name in record.validation if same_text(name) in training]
    if moved:
        say(f"splits_final.json has put {_joined(moved)} elsewhere; this run's split goes on as it began")


def _difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if len(was["images"]) != len(now["images"]):
        return f"{len(was['images'])} channels, now {len(now['images'])}"
    parts = [name for name in ("images", "labels") if was[name] != now[name]]
    return " and ".join({"images": "scan", "labels": "labels"}[name] for name in parts)


def _unordered(pairs: Pairs | None) -> set[frozenset[int]] | None:
    return None if pairs is None else set(map(frozenset, pairs))


def _named(pairs: Pairs | None, names: tuple[str, ...]) -> str:
    if pairs is None:
        return "off"
    return ",".join(f"{names[a]}:{names[b]}" for a, b in pairs) or "none"


def _joined(items: Any) -> str:
    listed = list(map(str, items))
    return ", ".join(listed if len(listed) <= 8 else [*listed[:7], f"... {len(listed)} in all"])
