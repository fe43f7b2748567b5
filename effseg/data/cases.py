"""Which files of a folder belong together, which of them are missing, and which cases train and validate."""

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from effseg.data.description import read_json, same_text
from effseg.data.listing import Listing, list_folder, nifti_suffix, stem
from effseg.data.nifti import SUFFIXES
from effseg.errors import InputError

FOLDS = 5
SPLIT_SEED = 12345  # both are nnU-Net's
SPLITS = "splits_final.json"

_CHANNEL = re.compile(r"(.+)_([0-9]{4})")
_Files = dict[str | None, Path]  # of a case, by channel; None for a name that has no channel
_LABELLED = "imagesTr/NAME_0000.nii.gz with labelsTr/NAME.nii.gz, or NAME_ct.nii.gz with NAME_seg.nii.gz"
_MOST_TOLD = 5


@dataclass(frozen=True)
class Case:
    """One scan on disk: its name, one file a channel, and its label file where there is one."""

    name: str
    images: tuple[Path, ...]
    labels: Path | None = None


@dataclass(frozen=True)
class Found:
    """cases: those of a folder that are whole, in name order. missing: what should be there as well and is
    not, or not whole: {name of the case, or of the file: what is wrong}. fewer: more cases are missing of
    which nothing but their number is known, in words; "" where none are. unpaired: like missing, label files
    NAME_seg without NAME_ct, which a folder of pairs may hold for another use."""

    cases: list[Case]
    missing: dict[str, str] = field(default_factory=dict)
    fewer: str = ""
    unpaired: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Description:
    """What dataset.json says of the files. channels: how many a case has. suffixed: every file's name ends
    with its channel (nnU-Net's `channel_names`). training: how many cases train."""

    channels: int | None = None
    suffixed: bool = False
    training: int | None = None


def look_for_cases(folder: str | Path, *, labelled: bool) -> Found:
    """The cases of a folder, in nnU-Net's layout or as flat files, and what of them is missing.

    labelled=True: `imagesTr/NAME_0000.nii.gz` (a file a channel) with `labelsTr/NAME.nii.gz`, or
    `NAME_ct.nii.gz` with `NAME_seg.nii.gz`. labelled=False: `imagesTs`, or else `imagesTr`, where there is
    such a folder, else every NIfTI file of the folder but `*_seg`: `NAME_ct`, `NAME_0000` (a file a channel)
    or any other `NAME`. Four digits are a channel only where `NAME_0000` stands beside or dataset.json has
    `channel_names`; an image `NAME_0001` with labels of that very name is a case of that name.
    Missing are: links that lead nowhere and other files that cannot be opened, channels, labels of scans and
    scans of labels, volumes in formats that are not read, and cases beyond those found that `numTraining` of
    dataset.json counts.
    Raises InputError where there is no such folder, nothing is found, two scans would be one case, or
    dataset.json cannot be used (an unsupported `file_ending`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: {'expected a folder' if folder.exists() else 'no such folder'}")
    if labelled:
        nnunet = (folder / "imagesTr").is_dir()
        found = _nnunet_cases(folder) if nnunet else _pairs(folder)
    else:
        names = ("imagesTs", "imagesTr")
        found = _scans(next((folder / name for name in names if (folder / name).is_dir()), folder))
    if not found.cases and not found.missing:
        raise InputError(f"{folder}: no cases: expected {_wanted(folder, labelled)}")
    return replace(found, cases=sorted(found.cases, key=lambda case: case.name))


def find_cases(folder: str | Path, *, labelled: bool) -> list[Case]:
    """The cases of `look_for_cases`; label files without a scan are left alone in a folder of pairs.

    Raises InputError where something is missing, too.
    """
    found = look_for_cases(folder, labelled=labelled)
    lacking = found.missing | ({"": found.fewer} if found.fewer else {})
    if lacking:
        raise InputError(describe_missing(lacking))
    return found.cases


def describe_missing(missing: Mapping[str, str]) -> str:
    """One line that says what is missing; of much the first ones, and the names of more."""
    told = list(missing.values())
    if len(told) <= _MOST_TOLD:
        return "; ".join(told)
    rest = [name for name in missing if name][_MOST_TOLD:]
    return "; ".join([*told[:_MOST_TOLD], f"and {len(told) - _MOST_TOLD} more: {_listed(rest)}"])


def case_of(path: str | Path) -> Case:
    """The case that one scan file belongs to: with NAME_0000.nii.gz come NAME_0001.nii.gz and so on.

    Raises InputError where one of its channels is missing.
    """
    path = Path(path)
    listing, description = list_folder(path.parent), _description(path.parent)
    match = _CHANNEL.fullmatch(stem(path))
    related = {path}
    if match:
        beside = [*listing.files, *listing.broken]
        related |= {file for file in beside if _CHANNEL.sub(r"\1", stem(file)) == match[1] != stem(file)}
    grouped = _group(related, description)
    name, files = next((name, files) for name, files in grouped.items() if path in files.values())
    wrong = _wrong(name, files, listing, description) if nifti_suffix(path.name) else ""
    if wrong:
        raise InputError(wrong)
    return Case(name, tuple(files.values()))


def select_cases(cases: Sequence[Case], selection: str | None) -> list[Case]:
    """Those of `cases` that a comma-separated `selection` names, in name order: see `select_names`."""
    chosen = set(select_names([case.name for case in cases], selection))
    return sorted((case for case in cases if case.name in chosen), key=lambda case: case.name)


def select_names(names: Iterable[str], selection: str | None) -> list[str]:
    """Those of `names` that a comma-separated `selection` names, in order.

    A term is a name, a range FIRST-LAST in name order (both must exist) or a pattern with shell wildcards.
    Raises InputError where a term names no case. None selects all.
    """
    names = sorted(names)
    if selection is None:
        return names
    chosen: set[str] = set()
    for term in _terms(selection):
        found = _named(names, term)
        if not found:
            raise InputError(f"no case {term!r}; there are {_listed(names)}")
        chosen.update(found)
    if not chosen:
        raise InputError(f"expected names of cases, found {selection!r}")
    return [name for name in names if name in chosen]


def selects_by_name(names: Iterable[str], selection: str | None) -> bool:
    """Whether every term of `selection` is the name of a case, so that it depends on no other case."""
    known = set(map(same_text, names))
    return selection is not None and all(same_text(term) in known for term in _terms(selection))


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
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: a link to {path.readlink()}, which is not there")
    return _chosen(_read_splits(path), fold) if path.is_file() else None


def _nnunet_cases(folder: Path) -> Found:
    """imagesTr with labelsTr."""
    description = _description(folder)
    images = list_folder(folder / "imagesTr")
    labels = list_folder(folder / "labelsTr") if (folder / "labelsTr").is_dir() else Listing()
    label_files = _by_case([*labels.files, *labels.broken])
    found = Found([], _unread(images) | _unread(labels))
    grouped = _group([*images.files, *images.broken], description, label_files)
    for name, files in grouped.items():
        path = label_files.pop(same_text(name), None)
        first = next(iter(files.values()))
        wrong = _wrong(name, files, images, description)
        if not wrong and path is None:
            expected = folder / "labelsTr" / (name + nifti_suffix(first.name))
            named = "" if None not in files else "expected a name with its channel, as NAME_0000.nii.gz, or "
            wrong = f"{first}: {named}its labels are missing: expected {expected}"
        if not wrong and path in labels.broken:
            wrong = f"{path}: {labels.broken[path]}"
        if wrong:
            found.missing[name] = wrong
        else:
            found.cases.append(Case(name, tuple(files.values()), path))
    for path in label_files.values():
        scan = folder / "imagesTr" / f"{stem(path)}_0000{nifti_suffix(path.name)}"
        found.missing[stem(path)] = f"{path}: the scan of these labels is missing: expected {scan}"
    return _counted(found, description, folder)


def _pairs(folder: Path) -> Found:
    """NAME_ct with NAME_seg; what else is in the folder is left alone."""
    listing = list_folder(folder)
    files = [*listing.files, *listing.broken]
    scans = _by_case([path for path in files if stem(path).endswith("_ct")], "_ct")
    label_files = _by_case([path for path in files if stem(path).endswith("_seg")], "_seg")
    found = Found([], {})
    for path in scans.values():
        name = stem(path).removesuffix("_ct")
        labels = label_files.pop(same_text(name), None)
        if path in listing.broken:
            found.missing[name] = f"{path}: {listing.broken[path]}"
        elif labels is None:
            expected = path.with_name(f"{name}_seg{nifti_suffix(path.name)}")
            found.missing[name] = f"{path}: its labels are missing: expected {expected}"
        elif labels in listing.broken:
            found.missing[name] = f"{labels}: {listing.broken[labels]}"
        else:
            found.cases.append(Case(name, (path,), labels))
    for path in label_files.values():
        name = stem(path).removesuffix("_seg")
        scan = path.with_name(f"{name}_ct{nifti_suffix(path.name)}")
        found.unpaired[name] = f"{path}: the scan of these labels is missing: expected {scan}"
    for path in listing.unread:
        if stem(path).partition(".")[0].endswith(("_ct", "_seg")):
            found.missing[path.name] = f"{path}: {path.suffix} files are not read, only {_formats()}"
    return _counted(found, _description(folder), folder)


def _scans(folder: Path) -> Found:
    """Every scan of a folder."""
    listing = list_folder(folder)
    description = _description(folder)
    files = [path for path in (*listing.files, *listing.broken) if not stem(path).endswith("_seg")]
    found = Found([], _unread(listing))
    for name, images in _group(files, description).items():
        wrong = _wrong(name, images, listing, description)
        if wrong:
            found.missing[name] = wrong
        else:
            found.cases.append(Case(name, tuple(images.values())))
    return found


def _group(
    files: Iterable[Path], description: _Description, labelled: Container[str] | None = None
) -> dict[str, _Files]:
    """The files of each case. labelled: the names that labels have, in nnU-Net's layout.

    Raises InputError where two scans would be one case, or two files one channel of it.
    """
    files = sorted(files)
    first_channels = {stem(path).removesuffix("_0000") for path in files if stem(path).endswith("_0000")}
    grouped: dict[str, _Files] = defaultdict(dict)
    names: dict[str, str] = {}
    for path in files:
        name, channel = stem(path), None
        match = _CHANNEL.fullmatch(name)
        if labelled is not None and not description.suffixed and same_text(name) in labelled:
            match = None
        if match and (
            description.suffixed
            or match[1] in first_channels
            or (labelled is not None and same_text(match[1]) in labelled)
        ):
            name, channel = match[1], match[2]
        elif labelled is None and not description.suffixed:
            name = name.removesuffix("_ct")
        taken = grouped[name]
        spelled = names.setdefault(same_text(name), name)
        if spelled != name or channel in taken or (taken and None in (channel, *taken)):
            other = next(iter(grouped[spelled].values()))
            raise InputError(
                f"{path.parent}: more than one scan would be case {name!r}: {other.name} and {path.name}"
            )
        taken[channel] = path
    return grouped


def _wrong(name: str, files: _Files, listing: Listing, description: _Description) -> str:
    """What is wrong with the files of a case; "" for nothing."""
    first = next(iter(files.values()))
    broken = next((path for path in files.values() if path in listing.broken), None)
    if broken is not None:
        return f"{broken}: {listing.broken[broken]}"
    if None in files:
        if description.suffixed:
            return f"{first}: expected a name with its channel, as NAME_0000.nii.gz"
        many = description.channels or 1
        return "" if many == 1 else f"{first}: expected {many} channels as in dataset.json, found 1 file"
    expected = [f"{index:04d}" for index in range(description.channels or len(files))]
    if list(files) == expected:
        return ""
    told = "0000 on" if description.channels is None else f"{', '.join(expected)} as in dataset.json"
    found = ", ".join(channel for channel in files if channel is not None)
    return f"{first.parent}: case {name!r} has the channels {found}, expected {told}"


def _by_case(files: Iterable[Path], ending: str = "") -> dict[str, Path]:
    """Files by case, where there is one a case. Raises InputError where a case has two."""
    named: dict[str, Path] = {}
    for path in sorted(files):
        name = same_text(stem(path).removesuffix(ending))
        if name in named:
            raise InputError(
                f"{path.parent}: more than one file would be case {name!r}: "
                f"{named[name].name} and {path.name}"
            )
        named[name] = path
    return named


def _unread(listing: Listing) -> dict[str, str]:
    return {
        path.name: f"{path}: {path.suffix} files are not read, only {_formats()}" for path in listing.unread
    }


def _counted(found: Found, description: _Description, folder: Path) -> Found:
    """With a word on cases of which no more is known than that dataset.json counts them."""
    there = len(found.cases) + len(found.missing) + len(found.unpaired)
    if description.training is None or there >= description.training:
        return found
    fewer = f"{folder / 'dataset.json'}: numTraining is {description.training}, found {there} cases"
    return replace(found, fewer=fewer)


def _description(folder: Path) -> _Description:
    """Of dataset.json in `folder`, or above a folder of images."""
    path = folder / "dataset.json"
    if not path.is_file() and folder.absolute().name.startswith("images"):
        path = folder.absolute().parent / "dataset.json"
    if not path.is_file():
        return _Description()
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected an object")
    ending = entries.get("file_ending", SUFFIXES[0])
    if not isinstance(ending, str) or ending.lower() not in SUFFIXES:
        raise InputError(f"{path}: file_ending: expected {_formats()}, got {ending!r}")
    names = entries.get("channel_names", entries.get("modality"))
    if names is not None and not (isinstance(names, dict) and names):
        raise InputError(f"{path}: channel_names: expected an object of numbers and names, got {names!r}")
    if names is not None and sorted(names) != sorted(map(str, range(len(names)))):
        raise InputError(f"{path}: channel_names: expected the numbers 0, 1, ..., got {', '.join(names)}")
    training = entries.get("numTraining")
    if training is not None and (isinstance(training, bool) or not str(training).isdecimal()):
        raise InputError(f"{path}: numTraining: expected a number, got {training!r}")
    return _Description(
        None if names is None else len(names),
        "channel_names" in entries,
        None if training is None else int(training),
    )


def _wanted(folder: Path, labelled: bool) -> str:
    wanted = _LABELLED if labelled else "NIfTI files (.nii.gz or .nii) to segment"
    listing = list_folder(folder)
    if listing.unread:
        kinds = sorted({path.suffix.lower() for path in listing.unread})
        return f"{wanted}; {', '.join(kinds)} files are not read"
    inside = next((sub for sub in listing.folders if any(_nifti_below(sub))), None)
    return wanted if inside is None else f"{wanted}; folders inside, as {inside.name}, are not looked into"


def _nifti_below(folder: Path) -> Iterable[Path]:
    try:
        yield from (path for path in folder.iterdir() if nifti_suffix(path.name))
    except OSError:
        return


def _formats() -> str:
    return " or ".join(SUFFIXES)


def _terms(selection: str) -> list[str]:
    return [term for term in map(str.strip, selection.split(",")) if term]


def _named(names: Sequence[str], term: str) -> list[str]:
    known = {same_text(name): name for name in names}
    term = same_text(term)
    if term in known:
        return [known[term]]
    if any(character in term for character in "*?["):
        return [name for name in names if fnmatchcase(same_text(name), term)]
    for hyphen in (index for index, character in enumerate(term) if character == "-"):
        first, last = known.get(term[:hyphen].strip()), known.get(term[hyphen + 1 :].strip())
        if first is not None and last is not None:
            return list(names[names.index(first) : names.index(last) + 1])
    return []


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


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed if len(listed) <= 12 else [*listed[:11], f"... {len(listed)} in all"])
