from dataclasses import dataclass

import numpy as np
import pytest
import torch

from effseg.data.augmentation import augmentation
from effseg.training.batches import Batches, margin_of, patch_start, with_margin
from effseg.training.sampling import Sampler


@dataclass
class Case:
    name: str
    image: np.ndarray
    labels: np.ndarray
    counts: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    outside: tuple[float, ...] = (-3.0,)


def make_cases(shapes):
    cases = []
    for number, shape in enumerate(shapes):
        rng = np.random.default_rng(number)
        labels = np.zeros(shape, np.uint8)
        labels[3, 4, 5] = 1
        cases.append(
            Case(
                f"case{number}",
                rng.integers(-1000, 1000, (1, *shape)).astype(np.int16),
                labels,
                np.array([labels.size - 1, 1]),
            )
        )
    return cases


def scale(image):
    return torch.from_numpy(image).float() / 1000


def jitter(image, labels, seed, spacing, outside):
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(image.shape)).astype(np.float32))
    return image + noise, labels


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_whole_volumes_as_they_are():
    cases = make_cases([(8, 9, 10), (7, 8, 9)])
    batches = Batches(cases, Sampler(2, seed=0), scale, None)
    for step in range(4):
        case = cases[Sampler(2, seed=0).batch(step)[0].case]
        image, labels = batches(step)
        assert image.dtype == torch.float32
        assert torch.equal(image, torch.from_numpy(case.image)[None].float() / 1000)
        assert torch.equal(labels, torch.from_numpy(case.labels)[None])


@pytest.mark.parametrize("patch_size", [None, (4, 5, 6)])
def test_threads_change_nothing_and_any_step_can_be_first(patch_size):
    cases = make_cases([(8, 9, 10)] * 3)
    batches = Batches(cases, Sampler(3, seed=5, batch_size=2), scale, jitter, patch_size)
    plain = [batches(step) for step in range(12)]
    for workers in (0, 1, 3):
        assert all(map(equal, plain, batches.ahead(0, 12, workers)))
        assert all(map(equal, plain[7:], batches.ahead(7, 12, workers)))
    assert len(list(batches.ahead(3, 3, 2))) == 0


def test_an_error_in_a_thread_reaches_the_caller():
    def fail(image, labels, seed, spacing, outside):
        raise RuntimeError("cannot augment")

    batches = Batches(make_cases([(8, 9, 10)]), Sampler(1, seed=0), scale, fail)
    with pytest.raises(RuntimeError, match="cannot augment"):
        list(batches.ahead(0, 3, 2))


def test_patches_are_cut_from_the_volume_after_augmentation_of_their_surroundings():
    shape, seen = (12, 14, 16), []

    def watch(image, labels, seed, spacing, outside):
        seen.append(tuple(image.shape[1:]))
        assert outside == (-3.0,)  # the whole volume's
        return image, labels

    cases = make_cases([shape])
    batches = Batches(cases, Sampler(1, seed=0), scale, watch, (7, 8, 9))
    whole = torch.from_numpy(cases[0].image).float() / 1000
    for step in range(20):
        image, labels = batches(step)
        assert image.shape == (1, 1, 7, 8, 9)
        assert labels.shape == (1, 7, 8, 9)
        windows = whole[0].unfold(0, 7, 1).unfold(1, 8, 1).unfold(2, 9, 1)
        assert (windows == image[0, 0]).all(-1).all(-1).all(-1).sum() == 1
    assert max(size[0] for size in seen) == 9  # a margin of 1 on both sides


def test_a_third_of_the_patches_hold_the_organ():
    shape, size = (40, 40, 40), (4, 4, 4)
    labels = np.zeros(shape, np.uint8)
    labels[20, 30, 10] = 2
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(900):
        start = patch_start(labels, np.array([63999, 0, 1]), size, rng)
        hits += labels[tuple(slice(a, a + 4) for a in start)].any()
    assert 0.29 < hits / 900 < 0.38
    starts = np.array([patch_start(labels * 0, np.array([64000, 0, 0]), size, rng) for _ in range(500)])
    assert starts.min() == 0
    assert starts.max() == 36


def test_margins_end_at_the_volume():
    region, inside = with_margin((0, 5, 10), (10, 10, 10), (20, 20, 20))
    assert region == (slice(None), slice(0, 12), slice(3, 17), slice(8, 20))
    assert inside == (slice(None), slice(0, 10), slice(2, 12), slice(2, 12))


@pytest.mark.parametrize("patch_size", [None, (4, 5, 6)])
def test_augmentation_on_a_device(patch_size):
    """The same volumes as ahead on the CPU where the augmentation is the same, whatever step is first."""
    cases = make_cases([(8, 9, 10)] * 3)
    sampler = Sampler(3, seed=5, batch_size=2)
    ahead = Batches(cases, sampler, scale, jitter, patch_size)
    on_device = Batches(cases, sampler, scale, jitter, patch_size, augment_on=torch.device("cpu"))
    expected = [ahead(step) for step in range(6)]
    for workers in (0, 2):
        assert all(map(equal, expected, on_device.ahead(0, 6, workers)))
        assert all(map(equal, expected[4:], on_device.ahead(4, 6, workers)))


def test_a_device_is_where_augmentation_runs():
    seen = []

    def augment(image, labels, seed, spacing, outside):
        seen.append((image.device.type, labels.device.type))
        return image, labels

    cases = make_cases([(8, 9, 10)])
    batches = Batches(cases, Sampler(1, 0), scale, augment, (4, 4, 4), augment_on=torch.device("meta"))
    (image, labels), *_ = batches.ahead(0, 1, 1)
    assert seen == [("meta", "meta")]
    assert (image.device.type, labels.device.type) == ("meta", "meta")
    assert (image.shape, labels.shape) == ((1, 1, 4, 4, 4), (1, 4, 4, 4))


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_patches_inside_of_the_body_hold_no_air(strength):
    """Their surroundings are turned with them, and they lie anywhere already: nothing comes in from outside
    where the volume goes on."""
    shape, size = (64, 64, 64), (16, 16, 16)
    case = Case("inside", np.zeros((1, *shape), np.int16), np.ones(shape, np.uint8), np.array([0, 64**3]))
    augment = augmentation(strength=strength, shifts=False)
    batches = Batches([case], Sampler(1, 0), scale, augment, size, patch_margin=margin_of(strength))
    air, seen = [], 0
    for step in range(100):
        rng = np.random.default_rng((3, batches.sampler.batch(step)[0].seed))
        start = patch_start(case.labels, case.counts, size, rng)
        if min(start) >= 5 and max(start) <= 43:  # its surroundings end nowhere at the volume
            seen += 1
            air.append(float((batches(step)[1] == 0).float().mean()))
    assert seen > 25
    assert np.mean(air) < 0.001
