"""Which files of a folder belong together, and which cases train and which validate."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from effseg.data.nifti import SUFFIXES
from effseg.errors import InputError

FOLDS = 5
SPLIT_SEED = 12345  # both are nnU-Net's

_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Case:
    """One scan on disk: its name, one file a channel, and its label file where there is one."""

    name: str
    images: tuple[Path, ...]
    labels: Path | None = None


def find_cases(folder: str | Path, *, labelled: bool) -> list[Case]:
    """The cases of a folder in name order, in nnU-Net's layout or as flat files.

    labelled=True: `imagesTr/NAME_0000.nii.gz` (a file a channel) with `labelsTr/NAME.nii.gz`, or
    `NAME_ct.nii.gz` with `NAME_seg.nii.gz`; every scan must have its labels, label files without a scan
    are left alone. labelled=False: `imagesTs`, or else `imagesTr`, where there is such a folder, else every
    NIfTI file of the folder but `*_seg`: `NAME_ct`, `NAME_0000` (a file a channel) or any other `NAME`.
    Raises InputError where nothing is found or a file is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: {'expected a folder' if folder.exists() else 'no such folder'}")
    if labelled:
        nnunet = folder / "imagesTr"
        cases = _channel_cases(nnunet) if nnunet.is_dir() else _pairs(folder)
        cases = [_with_labels(case, folder if nnunet.is_dir() else None) for case in cases]
        wanted = "imagesTr/NAME_0000.nii.gz with labelsTr/NAME.nii.gz, or NAME_ct.nii.gz with NAME_seg.nii.gz"
    else:
        nnunet = next(
            (folder / name for name in ("imagesTs", "imagesTr") if (folder / name).is_dir()), folder
        )
        cases = _scans(nnunet)
        wanted = "NIfTI files (.nii.gz or .nii) to segment"
    if not cases:
        raise InputError(f"{folder}: no cases: expected {wanted}")
    names = [case.name for case in cases]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{folder}: more than one scan would be case {twice!r}")
    return sorted(cases, key=lambda case: case.name)


def case_of(path: str | Path) -> Case:
    """The case that one scan file belongs to: with NAME_0000.nii.gz come NAME_0001.nii.gz and so on."""
    path = Path(path)
    name, suffix = _split(path)
    match = _CHANNEL.fullmatch(name)
    if match is None:
        return Case(name.removesuffix("_ct"), (path,))
    stem = match[1]
    channels = (path.with_name(f"{stem}_{channel:04d}{suffix}") for channel in count())
    images = tuple(takewhile(Path.exists, channels))
    return Case(stem, images if path in images else (path,))


def select_cases(cases: Sequence[Case], selection: str | None) -> list[Case]:
    """Those of `cases` that a comma-separated `selection` names, in name order.

    A term is a name, a range FIRST-LAST in name order (both must exist) or a pattern with shell wildcards.
    Raises InputError where a term names no case. None selects all.
    """
    cases = sorted(cases, key=lambda case: case.name)
    if selection is None:
        return cases
    names = [case.name for case in cases]
    chosen: set[str] = set()
    for term in filter(None, map(str.strip, selection.split(","))):
        found = _named(names, term)
        if not found:
            raise InputError(f"no case {term!r}; there are {_listed(names)}")
        chosen.update(found)
    if not chosen:
        raise InputError(f"expected names of cases, found {selection!r}")
    return [case for case in cases if case.name in chosen]


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
    names = [case.name for case in cases]
    path = Path(folder) / "splits_final.json"
    splits = _read_splits(path) if path.is_file() else _five_folds(names)
    if not str(fold).isdigit() or int(fold) >= len(splits):
        raise InputError(f"fold: expected 0 to {len(splits) - 1} or all, got {fold}")
    training, validation = (set(part) for part in splits[int(fold)])
    for name in names:
        if (name in training) == (name in validation):
            where = "both parts" if name in training else "neither part"
            raise InputError(f"{path}: case {name!r} is in {where} of fold {fold}")
    parts = (
        [case for case in cases if case.name in training],
        [case for case in cases if case.name in validation],
    )
    if not all(parts):
        raise InputError(
            f"{path}: none of the cases is in the {'validation' if parts[0] else 'training'} part"
        )
    return parts


def _split(path: Path) -> tuple[str, str]:
    """A file's name without its NIfTI suffix, and the suffix."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")
    return path.name.removesuffix(suffix), suffix


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(SUFFIXES) and path.is_file() and not path.name.startswith(".")
    )


def _channel_cases(folder: Path) -> list[Case]:
    """Cases from NAME_0000, NAME_0001, ...: every file must be such a one, and no channel may lack."""
    channels: dict[str, list[Path]] = defaultdict(list)
    for path in _files(folder):
        match = _CHANNEL.fullmatch(_split(path)[0])
        if match is None:
            raise InputError(f"{path}: expected a name with its channel, as NAME_0000.nii.gz")
        channels[match[1]].append(path)
    for name, files in channels.items():
        found = [_split(path)[0][-4:] for path in files]
        if found != [f"{index:04d}" for index in range(len(files))]:
            raise InputError(f"{folder}: case {name!r} has the channels {', '.join(found)}, expected 0000 on")
    return [Case(name, tuple(files)) for name, files in channels.items()]


def _pairs(folder: Path) -> list[Case]:
    files = [path for path in _files(folder) if _split(path)[0].endswith("_ct")]
    return [Case(_split(path)[0].removesuffix("_ct"), (path,)) for path in files]


def _scans(folder: Path) -> list[Case]:
    files = [path for path in _files(folder) if not _split(path)[0].endswith("_seg")]
    if files and all(_CHANNEL.fullmatch(_split(path)[0]) for path in files):
        return _channel_cases(folder)
    return [Case(_split(path)[0].removesuffix("_ct"), (path,)) for path in files]


def _with_labels(case: Case, nnunet: Path | None) -> Case:
    if nnunet is not None:
        candidates = [nnunet / "labelsTr" / (case.name + suffix) for suffix in SUFFIXES]
    else:
        candidates = [case.images[0].with_name(f"{case.name}_seg{suffix}") for suffix in SUFFIXES]
    labels = next((path for path in candidates if path.is_file()), None)
    if labels is None:
        raise InputError(f"{case.images[0]}: its labels are missing: expected {candidates[0]}")
    return Case(case.name, case.images, labels)


def _named(names: Sequence[str], term: str) -> list[str]:
    if term in names:
        return [term]
    if any(character in term for character in "*?["):
        return [name for name in names if fnmatchcase(name, term)]
    for hyphen in (index for index, character in enumerate(term) if character == "-"):
        first, last = term[:hyphen].strip(), term[hyphen + 1 :].strip()
        if first in names and last in names:
            return list(names[names.index(first) : names.index(last) + 1])
    return []


def _read_splits(path: Path) -> list[tuple[list[str], list[str]]]:
    try:
        return [(list(split["train"]), list(split["val"])) for split in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a list of objects with train and val: {error}") from error


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


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed if len(listed) <= 12 else [*listed[:11], f"... {len(listed)} in all"])
