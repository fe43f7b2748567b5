"""Trained networks with all that they need to segment a scan."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from effseg.data.labels import LabelMap, Labels, as_label_map
from effseg.data.nifti import Scan
from effseg.data.origin import checksum
from effseg.data.preprocessing import Prepared, Preprocessing
from effseg.errors import InputError
from effseg.inference.probabilities import Probabilities, most_probable
from effseg.inference.segmentation import keep_largest_components, probabilities, segment_prepared
from effseg.inference.weights import weights_files
from effseg.models.base import SegmentationModel
from effseg.models.registry import load

Size = tuple[int, int, int]


class Segmenter(Protocol):
    """A network, or several, as files are segmented by them: a :class:`Predictor` or an :class:`Ensemble`.

    scan: (C, X, Y, Z) -> its labels (X, Y, Z). Raises what :func:`predict_scan` does.
    """

    @property
    def label_map(self) -> LabelMap:
        """Classes, and their values in label files."""

    @property
    def fingerprint(self) -> str:
        """A checksum of weights and settings."""

    def __call__(self, scan: Scan) -> np.ndarray:
        """See :func:`predict_scan`."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained network with all it needs to segment a scan.

    patch_size: the patches it was trained on, or None for whole volumes. bf16: compute under autocast.
    largest_component: keep only the largest connected part of every organ.
    """

    model: SegmentationModel
    preprocessing: Preprocessing
    label_map: LabelMap
    patch_size: Size | None = None
    bf16: bool = False
    largest_component: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the network, its weights and all settings but the arithmetic's precision."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return checksum(
            digest.hexdigest(),
            self.model.function,
            self.preprocessing.to_dict(),
            self.label_map.to_dict(),
            self.patch_size,
            self.largest_component,
        )

    def __call__(self, scan: Scan) -> np.ndarray:
        """See :func:`predict_scan`."""
        return predict_scan(
            self.model,
            scan,
            self.preprocessing,
            self.label_map,
            bf16=self.bf16,
            patch_size=self.patch_size,
            largest_component=self.largest_component,
        )

    def probabilities(self, scan: Scan) -> Probabilities:
        """Probabilities of all classes, (K, D, H, W), on the network's own grid.

        Raises what :func:`predict_scan` does.
        """
        _check_channels(self.model, scan)
        prepared = self.preprocessing.prepare(scan)
        image = self.preprocessing.normalise(prepared.image)[None]
        with _computing(scan, prepared):
            found = probabilities(
                self.model,
                image,
                bf16=self.bf16,
                patch_size=self.patch_size,
                outside=self.preprocessing.outside(prepared.image),
            )
        return Probabilities(found, prepared.box)


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several networks for the same labels, whose probabilities are averaged on the scan's own grid.

    They may differ in all else: sizes, preprocessing, patches. Takes the memory of one network beside the
    weights of all, and in main memory 2 K bytes a voxel for each of them beside what `most_probable` does.
    Raises InputError for no members, or some that do not know the same labels or take other channels.
    """

    members: tuple[Predictor, ...]
    largest_component: bool = False

    def __post_init__(self) -> None:
        if not self.members:
            raise InputError("expected networks to average, got none")
        known = [(m.label_map.values, m.label_map.names[1:]) for m in self.members]
        for other in known[1:]:
            if other != known[0]:
                first, second = (
                    ", ".join(f"{value}:{name}" for value, name in zip(values[1:], names, strict=True))
                    for values, names in (known[0], other)
                )
                raise InputError(
                    f"expected networks for the same labels to average, got {first} and {second}"
                )
        channels = sorted({member.model.arguments["in_channels"] for member in self.members})
        if len(channels) > 1:
            raise InputError(f"expected networks of as many channels to average, got {channels}")

    @property
    def label_map(self) -> LabelMap:
        """The members'."""
        return self.members[0].label_map

    @cached_property
    def fingerprint(self) -> str:
        """Of the members, in any order, and all settings but the arithmetic's precision."""
        return checksum(sorted(member.fingerprint for member in self.members), self.largest_component)

    def __call__(self, scan: Scan) -> np.ndarray:
        """See :func:`predict_scan`."""
        parts = [member.probabilities(scan) for member in self.members]
        classes = most_probable(parts, scan.grid.ras_shape)
        if self.largest_component:
            classes = keep_largest_components(classes)
        return self.label_map.to_values(classes)


def predict_scan(
    model: SegmentationModel,
    scan: Scan,
    preprocessing: Preprocessing,
    label_map: LabelMap,
    *,
    bf16: bool = False,
    patch_size: Size | None = None,
    largest_component: bool = False,
) -> np.ndarray:
    """Segment one scan on the device of `model`.

    Returns (X, Y, Z) in RAS+ on the scan's own grid, in the values of the label files (uint8 or uint16),
    background outside of the crop. Raises InputError where the scan has no body or another number of
    channels than the network, or does not fit into the GPU's memory.
    """
    _check_channels(model, scan)
    prepared = preprocessing.prepare(scan)
    with _computing(scan, prepared):
        classes = segment_prepared(model, preprocessing, prepared, bf16=bf16, patch_size=patch_size)
    if largest_component:
        classes = keep_largest_components(classes)
    return label_map.to_values(classes)


def _check_channels(model: SegmentationModel, scan: Scan) -> None:
    expected, found = model.arguments["in_channels"], len(scan.array)
    if found != expected:
        raise InputError(
            f"{scan.paths[0]}: the network takes {_channels(expected)}, the scan has {_channels(found)}"
        )


@contextmanager
def _computing(scan: Scan, prepared: Prepared) -> Iterator[None]:
    """Errors name the scan, also one that does not fit into the GPU's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = "x".join(map(str, prepared.image.shape[1:]))
        raise InputError(
            f"{scan.paths[0]}: {size} voxels do not fit on the GPU; --device cpu takes main memory"
        ) from error
    except InputError as error:
        raise InputError(f"{scan.paths[0]}: {error}") from error


def load_predictor(
    checkpoint: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    device: torch.device | str = "cpu",
    *,
    bf16: bool = False,
    largest_component: bool = False,
    preprocessing: Preprocessing | None = None,
    labels: Labels | None = None,
    patch_size: Size | None = None,
) -> Predictor | Ensemble:
    """A predictor from a .safetensors file, or a run's folder (its best network, else its final one); an
    ensemble of several, or of all runs of a folder, such as those of its folds.

    preprocessing, labels, patch_size: for a file that does not say them, as one that `model.save` wrote
    without; see `effseg.data.labels.as_label_map`. A file's own are not changed: they are for the others of
    several.
    Raises InputError where there is no such file, or none in a run of several, it is there twice, lacks what
    is not given either, says otherwise than what is given, or its parts or the networks do not fit together.
    """
    given = [checkpoint] if isinstance(checkpoint, str | os.PathLike) else checkpoint
    paths = [path for one in given for path in weights_files(Path(one))]
    if not paths:
        raise InputError("checkpoint: expected files or folders, got none")
    settings = (preprocessing, labels, patch_size)
    if len(paths) == 1:
        return _load(paths[0], device, bf16, largest_component, *settings)
    members = tuple(_load(path, device, bf16, False, *settings, several=True) for path in paths)
    asked = (
        ("preprocessing", preprocessing, "--window, --spacing and --crop"),
        ("labels", labels, "--labels"),
        ("training", patch_size, "--patch-size"),
    )
    for key, given_setting, option in asked:
        if given_setting is not None and all(isinstance(m.model.extra.get(key), dict) for m in members):
            raise InputError(f"{key}: every network says its own, leave {option} out")
    prints = [member.fingerprint for member in members]
    for number, path in enumerate(paths):
        if prints[number] in prints[:number]:
            first = paths[prints.index(prints[number])]
            raise InputError(f"{path}: the same network as {first}, which would count twice")
    try:
        return Ensemble(members, largest_component)
    except InputError as error:
        raise InputError(f"{', '.join(map(str, paths))}: {error}") from error


def _load(
    path: Path,
    device: torch.device | str,
    bf16: bool,
    largest_component: bool,
    preprocessing: Preprocessing | None,
    labels: Labels | None,
    patch_size: Size | None,
    several: bool = False,
) -> Predictor:
    model = load(path, device)
    classes = model.arguments["num_classes"]
    found = {key: model.extra.get(key) for key in ("preprocessing", "labels", "training")}
    own = {key: entries if isinstance(entries, dict) else None for key, entries in found.items()}
    if several:
        preprocessing = preprocessing if own["preprocessing"] is None else None
        labels = labels if own["labels"] is None else None
        patch_size = patch_size if own["training"] is None else None
    try:
        chosen = _either(
            "preprocessing",
            None if own["preprocessing"] is None else Preprocessing.from_dict(own["preprocessing"]),
            preprocessing,
            "--window, --spacing and --crop",
        )
        label_map = _either(
            "labels",
            None if own["labels"] is None else LabelMap.from_dict(own["labels"]),
            None if labels is None else as_label_map(labels, classes),
            "--labels",
        )
        known = None if own["training"] is None else own["training"].get("patch_size")
        if own["training"] is not None and patch_size is not None:
            _either("patch_size", _patch_size(known) or "none, but whole volumes", patch_size, "--patch-size")
        predictor = Predictor(
            model, chosen, label_map, _patch_size(known) or patch_size, bf16, largest_component
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if classes != predictor.label_map.num_classes:
        known = predictor.label_map.num_classes
        raise InputError(f"{path}: the network has {classes} classes, its label map {known}")
    return predictor


def _either(name: str, own: Any, given: Any, option: str) -> Any:
    """What the file says, or else what is given."""
    if own is None and given is None:
        raise InputError(
            f"holds a network without the {name} that prediction needs: tell them with {option}, or "
            f"when it is saved, model.save(path, {name}=...)"
        )
    if own is not None and given is not None and own != given:
        raise InputError(f"{name}: the network was trained with {own}, leave {option} out")
    return given if own is None else own


def _patch_size(sizes: Sequence[int] | None) -> Size | None:
    if sizes is None:
        return None
    try:
        depth, height, width = map(int, sizes)
    except (TypeError, ValueError):
        raise InputError(f"patch_size: expected three sizes, got {sizes!r}") from None
    return depth, height, width


def _channels(count: int) -> str:
    return f"{count} channel" + ("" if count == 1 else "s")
