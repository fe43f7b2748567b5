"""Which files of a folder belong together, and which of them are missing."""

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from effseg.data.dataset_json import DatasetJson, formats, read_dataset_json
from effseg.data.description import same_text
from effseg.data.listing import Listing, is_there, list_folder, nifti_suffix, stem, why_broken
from effseg.data.origin import made_by
from effseg.data.selection import listed, select_names
from effseg.errors import InputError

__all__ = ["Case", "Found", "case_of", "describe_missing", "find_cases", "look_for_cases", "select_cases"]

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
    NAME_seg without NAME_ct, which a folder of pairs may hold for another use. segmented: label files that
    `effseg predict` has written among the scans, which are none."""

    cases: list[Case]
    missing: dict[str, str] = field(default_factory=dict)
    fewer: str = ""
    unpaired: dict[str, str] = field(default_factory=dict)
    segmented: tuple[Path, ...] = ()


def look_for_cases(folder: str | Path, *, labelled: bool) -> Found:
    """The cases of a folder, in nnU-Net's layout or as flat files, and what of them is missing.

    labelled=True: the files that dataset.json lists as `dataset`, or else `imagesTr/NAME_0000.nii.gz` (a file
    a channel) with `labelsTr/NAME.nii.gz`, or `NAME_ct.nii.gz` with `NAME_seg.nii.gz`.
    labelled=False: `imagesTs`, or else the images of `dataset`, or else `imagesTr`, where there is such a
    folder, else every NIfTI file of the folder but `*_seg` and what `effseg predict` has written: `NAME_ct`,
    `NAME_0000` (a file a channel) or any other `NAME`.
    Four digits are a channel only where `NAME_0000` stands beside or dataset.json has `channel_names`; an
    image `NAME_0001` with labels of that very name is a case of that name.
    Missing are: links that lead nowhere and other files that cannot be opened, channels, labels of scans and
    scans of labels, volumes in formats that are not read, and cases beyond those found that `numTraining` of
    dataset.json counts.
    Raises InputError where there is no such folder, nothing is found, two scans would be one case, or
    dataset.json cannot be used (an unsupported `file_ending`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: {'expected a folder' if folder.exists() else 'no such folder'}")
    description = read_dataset_json(folder)
    if description.files is not None and (labelled or not is_there(folder / "imagesTs")):
        found = _listed_cases(folder, description, description.files, labelled)
    elif labelled:
        found = _nnunet_cases(folder) if is_there(folder / "imagesTr") else _pairs(folder)
    else:
        names = ("imagesTs", "imagesTr")
        found = _scans(next((folder / name for name in names if is_there(folder / name)), folder))
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
    return "; ".join([*told[:_MOST_TOLD], f"and {len(told) - _MOST_TOLD} more: {listed(rest)}"])


def case_of(path: str | Path) -> Case:
    """The case that one scan file belongs to: with NAME_0000.nii.gz come NAME_0001.nii.gz and so on.

    Raises InputError where one of its channels is missing.
    """
    path = Path(path)
    listing, description = list_folder(path.parent), read_dataset_json(path.parent)
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


def _listed_cases(
    folder: Path,
    description: DatasetJson,
    files: Mapping[str, tuple[tuple[Path, ...], Path]],
    labelled: bool,
) -> Found:
    """What dataset.json itself lists."""
    found = Found([])
    for name, (images, labels) in files.items():
        used = (*images, labels) if labelled else images
        reasons = {path: why_broken(path) if nifti_suffix(path.name) else _not_read(path) for path in used}
        wrong = next((f"{path}: {reason}" for path, reason in reasons.items() if reason), "")
        if len(images) != len(description.channels or images):
            expected = len(description.channels or images)
            wrong = f"{folder}: dataset.json lists {len(images)} images of case {name!r}, expected {expected}"
        if wrong:
            found.missing[name] = wrong
        else:
            found.cases.append(Case(name, images, labels if labelled else None))
    return _counted(found, description, folder)


def _nnunet_cases(folder: Path) -> Found:
    """imagesTr with labelsTr."""
    description = read_dataset_json(folder)
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
            found.missing[path.name] = f"{path}: {_not_read(path)}"
    return _counted(found, read_dataset_json(folder), folder)


def _scans(folder: Path) -> Found:
    """Every scan of a folder."""
    listing = list_folder(folder)
    description = read_dataset_json(folder)
    segmented = tuple(path for path in listing.files if made_by(path) is not None)
    scans = [path for path in listing.files if path not in segmented]
    files = [path for path in (*scans, *listing.broken) if not stem(path).endswith("_seg")]
    found = Found([], _unread(listing), segmented=segmented)
    for name, images in _group(files, description).items():
        wrong = _wrong(name, images, listing, description)
        if wrong:
            found.missing[name] = wrong
        else:
            found.cases.append(Case(name, tuple(images.values())))
    return found


def _group(
    files: Iterable[Path], description: DatasetJson, labelled: Container[str] | None = None
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


def _wrong(name: str, files: _Files, listing: Listing, description: DatasetJson) -> str:
    """What is wrong with the files of a case; "" for nothing."""
    first = next(iter(files.values()))
    broken = next((path for path in files.values() if path in listing.broken), None)
    if broken is not None:
        return f"{broken}: {listing.broken[broken]}"
    if None in files:
        if description.suffixed:
            return f"{first}: expected a name with its channel, as NAME_0000.nii.gz"
        many = len(description.channels or ("",))
        return "" if many == 1 else f"{first}: expected {many} channels as in dataset.json, found 1 file"
    expected = [f"{index:04d}" for index in range(len(description.channels or files))]
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
    return {path.name: f"{path}: {_not_read(path)}" for path in listing.unread}


def _not_read(path: Path) -> str:
    return f"{path.suffix} files are not read, only {formats()}"


def _counted(found: Found, description: DatasetJson, folder: Path) -> Found:
    """With a word on cases of which no more is known than that dataset.json counts them."""
    there = len(found.cases) + len(found.missing) + len(found.unpaired)
    if description.training is None or there >= description.training:
        return found
    fewer = f"{folder / 'dataset.json'}: numTraining is {description.training}, found {there} cases"
    return replace(found, fewer=fewer)


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
