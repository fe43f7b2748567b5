"""Whole cases out of nnU-Net's preprocessed folders."""

from types import SimpleNamespace

import numpy as np
import torch

from effseg.data.preprocessing import AIR
from effseg.nnunet import cases
from effseg.training.sampling import Sampler

IMAGE = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(-1, 3, (1, 4, 5, 6)).astype(np.int16)


def case(name="a"):
    dataset = SimpleNamespace(load_case=lambda _: (IMAGE, LABELS, None, {}))
    return cases.PreprocessedCase(dataset, name, (3.0, 1.0, 2.0))


def test_what_was_cropped_away_is_background():
    np.testing.assert_array_equal(case().labels, LABELS[0].clip(0))
    assert case().labels.dtype == np.uint8


def test_voxels_of_classes():
    expected = 2 * np.bincount(LABELS[0].clip(0).ravel())[:2]
    np.testing.assert_array_equal(cases.count_voxels([case(), case()], 2), expected)


def test_batches_are_whole_volumes():
    found = list(cases.batches([case()], Sampler(1, seed=0), None, range(2), workers=1, pin=False))
    assert len(found) == 2
    for batch in found:
        torch.testing.assert_close(batch["data"], torch.from_numpy(IMAGE)[None])
        assert batch["target"].shape == (1, 4, 5, 6)


def test_augmentation_sees_left_to_right_first_and_air_as_air(monkeypatch):
    """x, the file's first axis and last of an array, is the plans' first here."""
    seen = {}

    def standard(image, labels, seed, spacing):
        seen.update(shape=tuple(image.shape), lowest=float(image.min()), spacing=spacing)
        return image, labels

    monkeypatch.setattr(cases, "augmentation", lambda mirror: standard)
    augment = cases.augmentation_of(None, [1, 2, 0])
    image, labels = torch.from_numpy(IMAGE), torch.from_numpy(LABELS[0])
    found, found_labels = augment(image, labels, 0, (3.0, 1.0, 2.0))
    assert seen["shape"] == (1, 5, 4, 6)
    assert seen["spacing"] == (1.0, 3.0, 2.0)
    assert abs(seen["lowest"] - AIR) < 1e-6
    torch.testing.assert_close(found, image)
    torch.testing.assert_close(found_labels, labels)


def test_augmentation_depends_on_the_seed_alone():
    augment = cases.augmentation_of(None, [0, 1, 2])
    image, labels = torch.from_numpy(IMAGE), torch.from_numpy(LABELS[0].clip(0))
    once, again, other = (augment(image, labels, seed, (3.0, 1.0, 2.0)) for seed in (1, 1, 2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    assert not torch.equal(once[0], other[0])
    assert once[0].shape == image.shape
    assert once[1].dtype == labels.dtype
