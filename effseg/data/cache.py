"""Prepared cases, kept on disk and mapped into memory, or kept in memory."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from effseg.common.atomic import atomic_path
from effseg.data.cases import Case
from effseg.data.identity import case_identity
from effseg.data.labels import LabelMap
from effseg.data.nifti import read_image, read_labels
from effseg.data.preprocessing import Prepared, Preprocessing
from effseg.errors import InputError, InputWarning

_FORMAT = 3  # raise it when prepared volumes change without a change of the settings

_Kind = Literal["training", "whole"]


@dataclass(frozen=True, eq=False)
class CachedCase:
    """A labelled case on its prepared grid, to learn from.

    image: (C, D, H, W) int16 (HU) or float32, before the window. labels: (D, H, W) classes in the label
    map's dtype. spacing: mm along D, H, W. counts: (K,) int64 voxels of each class, ignored ones left out.
    outside: `Preprocessing.outside` of the image.
    notes: what a person should know of the case, a line each.
    Arrays from disk are mapped copy-on-write: writing to them changes this process's copy only.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]
    counts: np.ndarray
    outside: tuple[float, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class WholeCase:
    """A labelled case as prediction and evaluation see it: a prepared scan, labels on the scan's own grid.

    labels: (X, Y, Z) classes in RAS+, outside of the crop, too. notes: as in `CachedCase`.
    """

    name: str
    prepared: Prepared
    labels: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def image(self) -> np.ndarray:
        return self.prepared.image

    @property
    def spacing(self) -> tuple[float, float, float]:
        return self.prepared.spacing


@dataclass(frozen=True, eq=False)
class _Stored:
    image: np.ndarray
    labels: np.ndarray
    entries: dict[str, Any]  # what JSON can hold


def prepare_case(
    case: Case,
    preprocessing: Preprocessing,
    label_map: LabelMap,
    folder: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
) -> CachedCase:
    """Read and prepare a labelled case to learn from, or take it from `folder` where it was prepared before.

    The crop holds every labelled voxel; where it is larger for that than the scan alone would make it, the
    case's notes say so.
    In `folder` a case is three files, NAME-KEY.image.npy, .labels.npy and .json, 3 bytes a voxel for CT.
    KEY is a hash of the files' paths and contents, of `preprocessing` and of `label_map`: what was prepared
    otherwise is never taken. Contents and not times: archives, containers and synchronised folders put other
    labels of the same size and time in a file's place, and copying changes times alone. The .json is written
    last, so that a case is whole or absent, and processes that prepare the same case at once write the same
    bytes; files that cannot be read any more are made again. Without `folder` the case stays in memory.
    identity: what `case_identity` says of the files, for which it reads them; None: it is asked.
    Raises InputError for files that cannot be used, labels without foreground allowed.
    """
    stored = _obtain("training", case, preprocessing, label_map, folder, identity)
    entries = stored.entries
    counts = np.array(entries["counts"], np.int64)
    spacing, outside = tuple(entries["spacing"]), tuple(entries["outside"])
    return CachedCase(
        case.name, stored.image, stored.labels, spacing, counts, outside, tuple(entries["notes"])
    )


def prepare_whole_case(
    case: Case,
    preprocessing: Preprocessing,
    label_map: LabelMap,
    folder: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
) -> WholeCase:
    """Read and prepare a labelled case to be predicted and scored; see `prepare_case`.

    The crop is that of prediction: the scan alone decides on it.
    """
    stored = _obtain("whole", case, preprocessing, label_map, folder, identity)
    entries = stored.entries
    x, y, z = (slice(start, stop) for start, stop in entries["box"])
    prepared = Prepared(stored.image, (x, y, z), tuple(entries["scan_shape"]), tuple(entries["spacing"]))
    return WholeCase(case.name, prepared, stored.labels, tuple(entries["notes"]))


def _obtain(
    kind: _Kind,
    case: Case,
    preprocessing: Preprocessing,
    label_map: LabelMap,
    folder: str | Path | None,
    identity: Mapping[str, Any] | None,
) -> _Stored:
    if case.labels is None:
        raise InputError(f"{case.images[0]}: expected labels for case {case.name!r}, it has none")
    if folder is None:
        return _prepare(kind, case, case.labels, preprocessing, label_map)
    key = _key(kind, case, identity or case_identity(case), preprocessing, label_map)
    stem = Path(folder) / f"{case.name}-{key}"
    record = stem.with_name(stem.name + ".json")
    stored = _load(stem, record) if record.is_file() else None
    if stored is None:
        _store(_prepare(kind, case, case.labels, preprocessing, label_map), stem, record)
        stored = _load(stem, record)
    if stored is None:
        raise InputError(f"{record}: what was written just now cannot be read; is the disk damaged?")
    return stored


def _load(stem: Path, record: Path) -> _Stored | None:
    """None for files that somebody, or a failing disk, has damaged: they can be made again."""
    try:
        return _Stored(
            np.load(_array(stem, "image"), mmap_mode="c"),
            np.load(_array(stem, "labels"), mmap_mode="c"),
            json.loads(record.read_text(encoding="utf-8")),
        )
    except (OSError, ValueError, EOFError):
        return None


def _prepare(
    kind: _Kind, case: Case, path: Path, preprocessing: Preprocessing, label_map: LabelMap
) -> _Stored:
    with _warnings() as notes:
        scan = read_image(case.images)
        classes = label_map.to_classes(read_labels(path, scan), path)
        foreground = classes > 0
        if label_map.ignore_index is not None:
            foreground &= classes != label_map.ignore_index
        prepared = preprocessing.prepare(scan, foreground if kind == "training" else None)
    entries = {
        "spacing": prepared.spacing,
        "box": [(side.start, side.stop) for side in prepared.box],
        "scan_shape": prepared.scan_shape,
        "notes": notes,
    }
    if kind == "whole":
        outside = np.count_nonzero(foreground) - np.count_nonzero(foreground[prepared.box])
        if outside:
            notes.append(f"{path}: {outside} labelled voxels lie outside of the crop, where nothing is found")
        return _Stored(prepared.image, classes, entries)
    if prepared.rescued:
        notes.append(f"{path}: the crop is made larger to hold {prepared.rescued} labelled voxels")
    labels = preprocessing.prepare_labels(classes, prepared)
    counts = np.zeros(label_map.num_classes, np.int64)
    for plane in labels:
        counts += np.bincount(plane.ravel(), minlength=label_map.num_classes)[: label_map.num_classes]
    # Of the whole volume: patches of it are not looked through for what lies outside.
    outside = preprocessing.outside(prepared.image)
    return _Stored(prepared.image, labels, entries | {"counts": counts.tolist(), "outside": outside})


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The texts of the warnings about the input; other warnings go on to whoever listens."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        yield texts
    for warning in caught:
        if issubclass(warning.category, InputWarning):
            texts.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _key(
    kind: _Kind,
    case: Case,
    identity: Mapping[str, Any],
    preprocessing: Preprocessing,
    label_map: LabelMap,
) -> str:
    # Paths, since notes name them, and how a file is read depends on its ending.
    paths = [str(path.resolve()) for path in (*case.images, case.labels) if path is not None]
    prepared = (_FORMAT, kind, paths, dict(identity), preprocessing.to_dict(), label_map.to_dict())
    return hashlib.sha256(json.dumps(prepared, sort_keys=True).encode()).hexdigest()[:24]


def _store(case: _Stored, stem: Path, record: Path) -> None:
    _write(_array(stem, "image"), lambda path: np.save(path, case.image))
    _write(_array(stem, "labels"), lambda path: np.save(path, case.labels))
    _write(record, lambda path: path.write_text(json.dumps(case.entries), encoding="utf-8"))


def _write(path: Path, writer: Callable[[Path], object]) -> None:
    try:
        with atomic_path(path) as temporary:
            writer(temporary)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _array(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}.{name}.npy")
