"""Prepared cases on disk and in memory."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effseg.data import cache
from effseg.data.cache import prepare_case, prepare_whole_case
from effseg.data.cases import find_cases
from effseg.data.labels import load_label_map
from effseg.data.preprocessing import AIR, Preprocessing
from effseg.errors import InputError
from effseg.phantom import write_dataset

PREPROCESSING = Preprocessing()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, cases=1, shape=(24, 20, 20), unseen=0)
    return folder


@pytest.fixture
def case(dataset: Path) -> cache.Case:
    return find_cases(dataset, labelled=True)[0]


def test_disk_and_memory_agree(dataset: Path, case: cache.Case, tmp_path: Path) -> None:
    label_map = load_label_map(dataset)
    kept = prepare_case(case, PREPROCESSING, label_map)
    first = prepare_case(case, PREPROCESSING, label_map, tmp_path)
    again = prepare_case(case, PREPROCESSING, label_map, tmp_path)
    for found in (first, again):
        assert isinstance(found.image, np.memmap)
        assert found.image.dtype == np.int16
        assert found.labels.dtype == np.uint8
        np.testing.assert_array_equal(found.image, kept.image)
        np.testing.assert_array_equal(found.labels, kept.labels)
        np.testing.assert_array_equal(found.counts, kept.counts)
        assert found.spacing == kept.spacing
        assert found.outside == kept.outside == (AIR,)
    np.testing.assert_array_equal(
        kept.counts, np.bincount(kept.labels.ravel(), minlength=label_map.num_classes)
    )
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_outside_is_the_whole_volumes(dataset: Path, case: cache.Case, tmp_path: Path) -> None:
    """A number of float32, as it was, from the file."""
    settings = Preprocessing((None,)), load_label_map(dataset), tmp_path
    assert prepare_case(case, *settings).outside == (float(prepare_case(case, *settings).image.min()),)


def test_what_is_stored_is_read_and_not_prepared_again(
    dataset: Path, case: cache.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_map = load_label_map(dataset)
    prepare_case(case, PREPROCESSING, label_map, tmp_path)
    monkeypatch.setattr(cache, "read_image", None)
    prepare_case(case, PREPROCESSING, label_map, tmp_path)


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [("image.npy", 300), ("labels.npy", 60), ("image.npy", 0), ("json", 5), ("labels.npy", None)],
)
def test_damaged_files_are_made_again(
    dataset: Path, case: cache.Case, tmp_path: Path, suffix: str, damage: int | None
) -> None:
    label_map = load_label_map(dataset)
    kept = prepare_case(case, PREPROCESSING, label_map)
    prepare_case(case, PREPROCESSING, label_map, tmp_path)
    (path,) = tmp_path.glob(f"*.{suffix}")
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(data[:damage])
    found = prepare_case(case, PREPROCESSING, label_map, tmp_path)
    np.testing.assert_array_equal(found.image, kept.image)
    np.testing.assert_array_equal(found.labels, kept.labels)
    assert path.read_bytes() == data


def test_another_setting_or_label_map_is_prepared_anew(
    dataset: Path, case: cache.Case, tmp_path: Path
) -> None:
    label_map = load_label_map(dataset)
    one_organ = load_label_map(dataset, label_map.names[1])

    def stored() -> int:
        return len(list(tmp_path.glob("*.json")))

    prepare_case(case, PREPROCESSING, label_map, tmp_path)
    prepare_case(case, Preprocessing(margin=20.0), label_map, tmp_path)
    assert stored() == 2
    assert prepare_case(case, PREPROCESSING, one_organ, tmp_path).labels.max() == 1
    assert stored() == 3


@pytest.mark.parametrize("prepare", [prepare_case, prepare_whole_case])
@pytest.mark.parametrize("what", ["image", "labels"])
def test_what_a_file_holds_counts_and_not_its_size_and_time(
    dataset: Path, case: cache.Case, tmp_path: Path, what: str, prepare: Callable[..., Any]
) -> None:
    """As archives and containers put another file in its place, or the same one with another time."""
    files = {"image": tmp_path / "image.nii", "labels": tmp_path / "labels.nii"}
    assert case.labels is not None
    for path, source in zip(files.values(), (case.images[0], case.labels), strict=True):
        path.write_bytes(gzip.decompress(source.read_bytes()))
        os.utime(path, (1, 1))
    settings = Preprocessing(crop="none"), load_label_map(dataset), tmp_path / "cache"

    def prepared() -> np.ndarray:
        found = prepare(cache.Case(case.name, (files["image"],), files["labels"]), *settings)
        return np.array(getattr(found, what))

    before, data = prepared(), files[what].read_bytes()
    voxels = np.frombuffer(data, np.uint8, offset=352)
    changed = np.where(voxels == 1, 2, voxels).astype(np.uint8)
    files[what].write_bytes(data[:352] + changed.tobytes())
    os.utime(files[what], (1, 1))
    assert files[what].stat().st_size == len(data)
    after = prepared()
    assert not np.array_equal(after, before)
    os.utime(files[what], (2, 2))
    np.testing.assert_array_equal(prepared(), after)
    assert len(list(settings[2].glob("*.json"))) == 2


def test_writing_to_a_mapped_array_does_not_reach_the_file(
    dataset: Path, case: cache.Case, tmp_path: Path
) -> None:
    label_map = load_label_map(dataset)
    found = prepare_case(case, PREPROCESSING, label_map, tmp_path)
    torch.from_numpy(found.image).fill_(7)
    assert prepare_case(case, PREPROCESSING, label_map, tmp_path).image.max() != 7


def test_a_full_disk_leaves_nothing(
    dataset: Path, case: cache.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, array: np.ndarray) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    with pytest.raises(InputError, match=r"image\.npy: cannot be written: No space left on device"):
        prepare_case(case, PREPROCESSING, load_label_map(dataset), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_labels_are_needed(case: cache.Case, dataset: Path) -> None:
    with pytest.raises(InputError, match="expected labels for case"):
        prepare_case(cache.Case(case.name, case.images), PREPROCESSING, load_label_map(dataset))


def test_an_unknown_label_value_names_the_file(dataset: Path, case: cache.Case) -> None:
    label_map = load_label_map(dataset)
    fewer = cache.LabelMap(label_map.names[:-1], label_map.values[:-1])
    with pytest.raises(InputError, match=rf"{case.name}.*: label value {label_map.values[-1]} is not in"):
        prepare_case(case, PREPROCESSING, fewer)


def test_a_file_that_is_gone(case: cache.Case, dataset: Path, tmp_path: Path) -> None:
    gone = cache.Case("gone", (tmp_path / "gone.nii.gz",), case.labels)
    with pytest.raises(InputError, match=r"gone\.nii\.gz: damaged, or cannot be read: No such file"):
        prepare_case(gone, PREPROCESSING, load_label_map(dataset), tmp_path)
