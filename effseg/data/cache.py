"""Prepared cases, kept on disk and mapped into memory, or kept in memory."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effseg.atomic import atomic_path
from effseg.data.cases import Case
from effseg.data.labels import LabelMap
from effseg.data.nifti import read_image, read_labels
from effseg.data.preprocessing import Preprocessing
from effseg.errors import InputError

_FORMAT = 1  # raise it when prepared volumes change without a change of the settings


@dataclass(frozen=True, eq=False)
class CachedCase:
    """A labelled case on its prepared grid.

    image: (C, D, H, W) int16 (HU) or float32, before the window. labels: (D, H, W) classes in the label
    map's dtype. spacing: mm along D, H, W. counts: (K,) int64 voxels of each class, ignored ones left out.
    Arrays from disk are mapped copy-on-write: writing to them changes this process's copy only.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]
    counts: np.ndarray


def prepare_case(
    case: Case, preprocessing: Preprocessing, label_map: LabelMap, folder: str | Path | None = None
) -> CachedCase:
    """Read and prepare a labelled case, or take it from `folder` where it was prepared before.

    In `folder` a case is three files, NAME-KEY.image.npy, .labels.npy and .json, 3 bytes a voxel for CT.
    KEY is a hash of the files' paths, sizes and times of change, of `preprocessing` and of `label_map`:
    what was prepared otherwise is never taken. The .json is written last, so that a case is whole or
    absent, and processes that prepare the same case at once write the same bytes. Without `folder` the
    case stays in memory.
    Raises InputError for files that cannot be used, labels without foreground allowed.
    """
    if case.labels is None:
        raise InputError(f"{case.images[0]}: expected labels for case {case.name!r}, it has none")
    if folder is None:
        return _prepare(case, case.labels, preprocessing, label_map)
    stem = Path(folder) / f"{case.name}-{_key(case, preprocessing, label_map)}"
    record = stem.with_name(stem.name + ".json")
    if not record.is_file():
        _store(_prepare(case, case.labels, preprocessing, label_map), stem, record)
    entries = json.loads(record.read_text(encoding="utf-8"))
    return CachedCase(
        case.name,
        np.load(_array(stem, "image"), mmap_mode="c"),
        np.load(_array(stem, "labels"), mmap_mode="c"),
        tuple(entries["spacing"]),
        np.array(entries["counts"], np.int64),
    )


def _prepare(case: Case, path: Path, preprocessing: Preprocessing, label_map: LabelMap) -> CachedCase:
    scan = read_image(case.images)
    classes = label_map.to_classes(read_labels(path, scan), path)
    prepared = preprocessing.prepare(scan)
    labels = preprocessing.prepare_labels(classes, prepared)
    counts = np.zeros(label_map.num_classes, np.int64)
    for plane in labels:
        counts += np.bincount(plane.ravel(), minlength=label_map.num_classes)[: label_map.num_classes]
    return CachedCase(case.name, prepared.image, labels, prepared.spacing, counts)


def _key(case: Case, preprocessing: Preprocessing, label_map: LabelMap) -> str:
    files = []
    for path in (*case.images, case.labels):
        assert path is not None
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        files.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
    identity = (_FORMAT, files, preprocessing.to_dict(), label_map.to_dict())
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def _store(case: CachedCase, stem: Path, record: Path) -> None:
    entries = {"spacing": case.spacing, "counts": case.counts.tolist()}
    _write(_array(stem, "image"), lambda path: np.save(path, case.image))
    _write(_array(stem, "labels"), lambda path: np.save(path, case.labels))
    _write(record, lambda path: path.write_text(json.dumps(entries), encoding="utf-8"))


def _write(path: Path, writer: Callable[[Path], object]) -> None:
    try:
        with atomic_path(path) as temporary:
            writer(temporary)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _array(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}.{name}.npy")
