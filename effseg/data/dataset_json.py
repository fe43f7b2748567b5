"""What nnU-Net's dataset.json says of a data set's files; its labels are read by `effseg.data.labels`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effseg.data.description import DATASET_JSON, read_json, same_text
from effseg.data.listing import is_there
from effseg.data.nifti import SUFFIXES
from effseg.errors import InputError


@dataclass(frozen=True)
class DatasetJson:
    """channels: their names (`channel_names`, or `modality`), None where they are not told. suffixed: every
    file's name ends with its channel (nnU-Net's `channel_names`). training: how many cases train. files: the
    images, one a channel, and the label file of every case, where dataset.json lists them itself (`dataset`).
    """

    channels: tuple[str, ...] | None = None
    suffixed: bool = False
    training: int | None = None
    files: Mapping[str, tuple[tuple[Path, ...], Path]] | None = None


def read_dataset_json(folder: str | Path) -> DatasetJson:
    """Of dataset.json in `folder`, or above a folder of images; nothing is known where there is none.

    One above tells how files are named, not which of the data set's files lie in this folder: of `training`
    and `files` nothing is known then. Raises InputError where it cannot be read or used (an unsupported
    `file_ending`).
    """
    folder = Path(folder)
    path = folder / DATASET_JSON
    above = not is_there(path) and folder.absolute().name.startswith("images")
    if above:
        path = folder.absolute().parent / DATASET_JSON
    if not is_there(path):
        return DatasetJson()
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected an object")
    ending = entries.get("file_ending", SUFFIXES[0])
    if not isinstance(ending, str) or ending.lower() not in SUFFIXES:
        raise InputError(f"{path}: file_ending: expected {formats()}, got {ending!r}")
    names = entries.get("channel_names", entries.get("modality"))
    if names is not None and not (isinstance(names, dict) and names):
        raise InputError(f"{path}: channel_names: expected an object of numbers and names, got {names!r}")
    if names is not None and sorted(names) != sorted(map(str, range(len(names)))):
        raise InputError(f"{path}: channel_names: expected the numbers 0, 1, ..., got {', '.join(names)}")
    training = entries.get("numTraining")
    if training is not None and (isinstance(training, bool) or not str(training).isdecimal()):
        raise InputError(f"{path}: numTraining: expected a number, got {training!r}")
    files = None if "dataset" not in entries else _files(entries["dataset"], path)
    return DatasetJson(
        None if names is None else tuple(str(names[str(index)]) for index in range(len(names))),
        "channel_names" in entries,
        None if training is None or above else int(training),
        None if above else files,
    )


def formats() -> str:
    """Of volumes that are read, for people."""
    return " or ".join(SUFFIXES)


def _files(entries: Any, path: Path) -> dict[str, tuple[tuple[Path, ...], Path]]:
    """{case: {"images": [file a channel], "label": file}}, relative to the folder of dataset.json."""
    if not (isinstance(entries, dict) and entries):
        raise InputError(f"{path}: dataset: expected an object of cases, got {entries!r}")
    if len({same_text(name) for name in entries}) < len(entries):
        raise InputError(f"{path}: dataset: expected every case once, got {', '.join(entries)}")
    found = {}
    for name, files in entries.items():
        images, label = (files.get("images"), files.get("label")) if isinstance(files, dict) else (None, None)
        good = isinstance(images, list) and bool(images) and all(isinstance(file, str) for file in images)
        if not (good and images and isinstance(label, str)):
            expected = "expected images, a list, and label"
            raise InputError(f"{path}: dataset: case {name!r}: {expected}, got {files!r}")
        if not name or name != Path(name).name:
            raise InputError(f"{path}: dataset: expected names of cases that a file can have, got {name!r}")
        found[name] = tuple(_placed(file, path) for file in images), _placed(label, path)
    return found


def _placed(file: str, path: Path) -> Path:
    return Path(os.path.normpath(path.parent / os.path.expandvars(file)))  # as nnU-Net does
