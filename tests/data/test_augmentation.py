"""Random changes: a function of the seed, right in space, careful with memory."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from effseg.data import device_augmentation
from effseg.data.augmentation import RandomPoseD, augmentation
from effseg.data.mirroring import Pairs
from effseg.data.preprocessing import AIR, filling
from effseg.errors import InputError


def sample(shape: tuple[int, int, int] = (20, 18, 16)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, *shape), generator=generator) * 3 + AIR
    return image, torch.randint(0, 5, shape, generator=generator, dtype=torch.uint8)


class TestSeed:
    def test_the_same_seed_gives_the_same_bits(self) -> None:
        augment = augmentation()
        image, labels = sample()
        seen = []
        for seed in range(12):
            first, second = augment(image, labels, seed), augmentation()(image, labels, seed)
            assert torch.equal(first[0], second[0])
            assert torch.equal(first[1], second[1])
            seen.append(first[0])
        assert not any(torch.equal(seen[0], other) for other in seen[1:])

    def test_threads_do_not_disturb_each_other(self) -> None:
        augment = augmentation()
        image, labels = sample()
        alone = [augment(image, labels, seed) for seed in range(16)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda seed: augment(image, labels, seed), range(16)))
        for (image_1, labels_1), (image_2, labels_2) in zip(alone, together, strict=True):
            assert torch.equal(image_1, image_2)
            assert torch.equal(labels_1, labels_2)

    def test_no_global_random_state_is_touched(self) -> None:
        np.random.seed(3)
        torch.manual_seed(3)
        before = np.random.get_state()[1].copy(), torch.get_rng_state()
        augmentation()(*sample(), 5)
        np.testing.assert_array_equal(np.random.get_state()[1], before[0])
        assert torch.equal(torch.get_rng_state(), before[1])


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
    def test_plain_tensors_of_the_same_kind(self, dtype: torch.dtype) -> None:
        image, labels = sample()
        labels = labels.to(dtype)
        labels[3:9, 4:9, 4:9] = 255
        kept = image.clone(), labels.clone()
        for seed in range(6):
            new_image, new_labels = augmentation()(image, labels, seed)
            assert type(new_image) is torch.Tensor
            assert type(new_labels) is torch.Tensor
            assert (new_image.dtype, new_labels.dtype) == (torch.float32, dtype)
            assert new_image.shape == image.shape
            assert new_labels.shape == labels.shape
            assert set(new_labels.unique().tolist()) <= {0, 1, 2, 3, 4, 255}
            assert torch.isfinite(new_image).all()
        assert torch.equal(image, kept[0])
        assert torch.equal(labels, kept[1])

    def test_several_channels_move_together(self) -> None:
        image, labels = sample()
        new, _ = augmentation(strength=1.0)(torch.cat([image, image]), labels, 1)
        assert new.shape == (2, 20, 18, 16)
        assert torch.corrcoef(new.flatten(1))[0, 1] > 0.99

    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (3, 1, 2)])
    def test_thin_volumes(self, shape: tuple[int, int, int]) -> None:
        image, labels = sample(shape)
        for seed in range(4):
            assert augmentation()(image, labels, seed)[0].shape == (1, *shape)


class TestMirror:
    @pytest.mark.parametrize(
        ("mirror", "exchanged", "expected"),
        [
            (None, [0, 1, 2, 3, 4], {False}),
            ((), [0, 1, 2, 3, 4], {True, False}),
            (((1, 3), (4, 2)), [0, 3, 4, 1, 2], {True, False}),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
    def test_left_to_right_where_asked_for(self, mirror, exchanged, expected, dtype) -> None:  # type: ignore[no-untyped-def]
        image, labels = sample()
        labels = labels.to(dtype)
        labels[3:5, 4:7] = 255  # ignored
        table = torch.tensor([*exchanged, *range(5, 256)])
        mirrored = image.flip(1), table[labels.flip(0).long()].to(dtype)
        augment = augmentation(mirror, strength=0.0)
        seen = set()
        for seed in range(12):
            new_image, new_labels = augment(image, labels, seed)
            flipped = not torch.equal(new_labels, labels)
            seen.add(flipped)
            assert torch.equal(new_labels, mirrored[1] if flipped else labels)
            torch.testing.assert_close(new_image, mirrored[0] if flipped else image)
        assert seen == expected


class TestPose:
    def pose(self, matrix: np.ndarray, image: torch.Tensor, labels: torch.Tensor) -> dict:
        transform = RandomPoseD(1.0, (1.0, 1.0, 1.0))
        transform.randomize = lambda shape: matrix  # type: ignore[method-assign]
        return transform({"image": image, "labels": labels[None]})

    def test_identity(self) -> None:
        image, labels = sample()
        moved = self.pose(np.eye(4), image, labels)
        torch.testing.assert_close(moved["image"], image, atol=2e-5, rtol=0)
        assert torch.equal(moved["labels"][0], labels)

    @pytest.mark.parametrize("slab_voxels", [1, 18 * 16 * 3, 1 << 21])
    def test_a_shift_by_whole_voxels_brings_in_air(
        self, slab_voxels: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(device_augmentation, "SLAB_VOXELS", slab_voxels)
        image, labels = sample()
        matrix = np.eye(4)
        matrix[:3, 3] = 3, -2, 0
        moved = self.pose(matrix, image, labels)
        torch.testing.assert_close(moved["image"][:, :17, 2:], image[:, 3:, :-2], atol=5e-5, rtol=0)
        torch.testing.assert_close(moved["image"][:, 17:], torch.full((1, 3, 18, 16), AIR))
        torch.testing.assert_close(moved["image"][:, :, :2], torch.full((1, 20, 2, 16), AIR))
        assert torch.equal(moved["labels"][0, :17, 2:], labels[3:, :-2])
        assert not moved["labels"][0, 17:].any()

    def test_every_channel_has_its_own_outside(self) -> None:
        """The same on the CPU and on a device."""
        image, labels = torch.cat([sample()[0]] * 3), sample()[1]
        outside = (AIR, 0.0, -1000.0)
        matrix = np.eye(4)
        matrix[:3, 3] = 3, -2, 0
        fill = filling(outside, image)
        here = RandomPoseD(1.0, (1.0, 1.0, 1.0), fill)
        here.randomize = lambda shape: matrix  # type: ignore[method-assign]
        changes = device_augmentation.Changes(matrix)
        for moved in (
            here({"image": image, "labels": labels[None]})["image"],
            device_augmentation.change(image.clone(), labels.clone(), changes, 0, fill)[0],
        ):
            torch.testing.assert_close(moved[:, 17:], fill.expand(3, 3, 18, 16))
            torch.testing.assert_close(moved[:, :, :2], fill.expand(3, 20, 2, 16))
            torch.testing.assert_close(moved[:, :17, 2:], image[:, 3:, :-2], atol=2e-3, rtol=0)

    @pytest.mark.parametrize("on_device", [False, True])
    def test_no_outside_is_air_to_the_bit(self, on_device: bool) -> None:
        image, labels = sample()
        augment = augmentation(on_device=on_device)
        for seed in range(4):
            given = augment(image.clone(), labels.clone(), seed, (1.0, 2.0, 3.0), (AIR,))
            expected = augment(image.clone(), labels.clone(), seed, (1.0, 2.0, 3.0))
            assert all(map(torch.equal, given, expected))

    @pytest.mark.parametrize("on_device", [False, True])
    def test_another_number_of_values_than_channels_is_refused(self, on_device: bool) -> None:
        with pytest.raises(InputError, match="outside: expected one value a channel, 1, got 2"):
            augmentation(on_device=on_device)(*sample(), 0, (1.0, 1.0, 1.0), (AIR, 0.0))

    def test_slabs_do_not_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image, labels = sample()
        matrix = RandomPoseD(1.0, (3.0, 1.0, 2.0)).set_random_state(5).randomize((20, 18, 16))
        assert matrix is not None
        whole = self.pose(matrix, image, labels)
        monkeypatch.setattr(device_augmentation, "SLAB_VOXELS", 18 * 16 * 3)
        slabs = self.pose(matrix, image, labels)
        torch.testing.assert_close(whole["image"], slabs["image"], atol=1e-4, rtol=0)
        assert (whole["labels"] == slabs["labels"]).float().mean() > 0.999

    @pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.2, 4.2, 2.5), (0.7, 0.7, 5.0)])
    def test_ranges_and_rotation_in_mm(self, spacing: tuple[float, float, float]) -> None:
        shape = np.array((128, 64, 96))
        centre = np.append((shape - 1) / 2, 1)
        transform = RandomPoseD(1.0, spacing).set_random_state(0)
        matrices = [transform.randomize(shape) for _ in range(400)]
        moved = [matrix for matrix in matrices if matrix is not None]
        assert 0.68 < len(moved) / len(matrices) < 0.82
        angles, zooms = [], []
        for matrix in moved:
            in_mm = np.diag(spacing) @ matrix[:3, :3] @ np.diag(1 / np.array(spacing))
            scales = np.linalg.norm(in_mm, axis=0)
            turn = in_mm / scales
            np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-9)
            angles.append(np.rad2deg(np.arccos((np.trace(turn) - 1) / 2)))
            zooms.append(scales)
            assert np.all(np.abs((matrix @ centre - centre)[:3]) <= shape / 8 + 1e-9)
        assert 0.88 - 1e-9 <= np.min(zooms) < 0.9
        assert 1.1 < np.max(zooms) <= 1.12 + 1e-9
        assert 8 < np.max(angles) <= 8 * np.sqrt(3) + 0.1

    def test_strength_scales_the_zoom(self) -> None:
        transform = RandomPoseD(2.0, (1.0, 1.0, 1.0)).set_random_state(0)
        matrices = [transform.randomize((8, 8, 8)) for _ in range(400)]
        zooms = [np.linalg.norm(matrix[:3, :3], axis=0) for matrix in matrices if matrix is not None]
        assert 0.76 - 1e-9 <= np.min(zooms) < 0.8
        assert 1.2 < np.max(zooms) <= 1.24 + 1e-9

    def test_strength_scales(self) -> None:
        image, labels = sample()
        weak = [augmentation(strength=0.1)(image, labels, seed)[0] for seed in range(8)]
        strong = [augmentation(strength=1.0)(image, labels, seed)[0] for seed in range(8)]
        for less, more in zip(weak, strong, strict=True):
            assert (less - image).abs().mean() < (more - image).abs().mean()


class TestOnDevice:
    """The path of a GPU, on the CPU's tensors."""

    @pytest.mark.parametrize("slab_voxels", [1, 18 * 16 * 3, 1 << 21])
    @pytest.mark.parametrize("mirror", [None, (), ((1, 2), (3, 4))])
    def test_as_on_the_cpu_but_for_the_noise(
        self, mirror: Pairs | None, slab_voxels: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(device_augmentation, "SLAB_VOXELS", slab_voxels)
        image, labels = sample()
        image = torch.cat([image, image.flip(1)])
        here, there = augmentation(mirror), augmentation(mirror, on_device=True)
        noisy = 0
        for seed in range(24):
            expected = here(image, labels, seed, (1.0, 2.0, 3.0), (AIR, 0.25))
            given = there(image.clone(), labels, seed, (1.0, 2.0, 3.0), (AIR, 0.25))
            assert torch.equal(given[1], expected[1])
            assert given[1].dtype == labels.dtype
            assert type(given[0]) is torch.Tensor
            difference = (given[0] - expected[0]).abs()
            # Rounding of values of up to 1.5 * 1.1 + 0.1, in a few operations; noise is far above it.
            if difference.max() > 16 * torch.finfo(torch.float32).eps:
                noisy += 1
                assert difference.std() > 1e-4
        assert 2 <= noisy <= 14  # 3 in 10

    def test_noise_of_the_deviation_that_is_drawn(self) -> None:
        clean = device_augmentation.Changes()
        noisy = device_augmentation.Changes(noise=0.05)
        image, labels = torch.zeros(2, 40, 40, 40), torch.zeros(40, 40, 40, dtype=torch.uint8)
        found = device_augmentation.change(image.clone(), labels, noisy, 7)[0]
        again = device_augmentation.change(image.clone(), labels, noisy, 7)[0]
        other = device_augmentation.change(image.clone(), labels, noisy, 8)[0]
        assert torch.equal(found, again)
        assert torch.equal(device_augmentation.change(image.clone(), labels, clean, 7)[0], image)
        # Of 128,000 independent numbers: five standard errors of mean, deviation and correlation.
        standard_error = 0.05 / found.numel() ** 0.5
        assert abs(found.mean()) < 5 * standard_error
        assert abs(found.std() - 0.05) < 5 * standard_error / 2**0.5
        pairs = torch.stack([found.flatten(), other.flatten()]), found.flatten(1), found[0].flatten(1)
        for rows in pairs:  # seeds, channels, planes
            correlation = torch.corrcoef(rows[:2])[0, 1]
            assert abs(correlation) < 5 / rows.shape[1] ** 0.5

    def test_the_noise_is_as_strong_as_on_the_cpu(self) -> None:
        """A seed draws one deviation for both."""
        image, labels = torch.zeros(1, 40, 40, 40), torch.zeros(40, 40, 40, dtype=torch.uint8)
        seen = 0
        for seed in range(40):
            spreads = [
                augmentation(on_device=on_device)(image.clone(), labels, seed)[0][:, 18:22, 18:22].std()
                for on_device in (False, True)
            ]
            if max(spreads) > 1e-3:
                seen += 1
                assert 0.7 < spreads[0] / spreads[1] < 1.4  # of 640 numbers each: 2.8 %
        assert seen > 3

    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (3, 1, 2)])
    def test_thin_volumes(self, shape: tuple[int, int, int]) -> None:
        for seed in range(6):
            image, labels = sample(shape)
            expected = augmentation(())(image, labels, seed)[1]
            assert torch.equal(augmentation((), on_device=True)(image, labels, seed)[1], expected)
