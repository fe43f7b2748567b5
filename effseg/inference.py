"""Whole scans through a trained network, from files to label files."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from effseg.common.formats import label_dtype
from effseg.data.cases import Case, Found, case_of, look_for_cases
from effseg.data.identity import case_identity
from effseg.data.labels import LabelMap, Labels, as_label_map
from effseg.data.listing import nifti_suffix
from effseg.data.nifti import Scan, read_image, write_labels
from effseg.data.origin import checksum, made_by
from effseg.data.preprocessing import AIR, Preprocessing
from effseg.errors import InputError
from effseg.models.base import SegmentationModel
from effseg.models.registry import load
from effseg.parallel.partition import own_rows
from effseg.parallel.reduction import whole

__all__ = [
    "Predictor",
    "keep_largest_components",
    "load_predictor",
    "predict_files",
    "predict_scan",
    "segment",
]

OVERLAP = 0.5  # of neighbouring patches, where a network was trained on patches

Size = tuple[int, int, int]
OnCase = Callable[[Path, Scan, float], None]


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
        """A checksum of the weights and of all settings but the arithmetic's precision."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        settings = (self.preprocessing.to_dict(), self.label_map.to_dict(), self.patch_size)
        return checksum(digest.hexdigest(), *settings, self.largest_component)

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
    expected = model.arguments["in_channels"]
    found = len(scan.array)
    if found != expected:
        raise InputError(
            f"{scan.paths[0]}: the network takes {_channels(expected)}, the scan has {_channels(found)}"
        )
    prepared = preprocessing.prepare(scan)
    image = preprocessing.normalise(prepared.image)[None]
    try:
        classes = segment(model, image, bf16=bf16, patch_size=patch_size)[0].numpy()
    except torch.OutOfMemoryError as error:
        size = "x".join(map(str, image.shape[2:]))
        raise InputError(
            f"{scan.paths[0]}: {size} voxels do not fit on the GPU; --device cpu takes main memory"
        ) from error
    del image
    if largest_component:
        classes = keep_largest_components(classes)
    return label_map.to_values(preprocessing.restore(classes, prepared))


@torch.no_grad()
def segment(
    model: SegmentationModel, image: torch.Tensor, *, bf16: bool = False, patch_size: Size | None = None
) -> torch.Tensor:
    """Classes (N, D, H, W) uint8 or int16, on the CPU, of a normalised image (N, C, D, H, W).

    The whole volume at once; with `patch_size` MONAI's sliding window with Gaussian weights, whose logits
    are put together on the CPU. The model runs in evaluation mode and comes back in the mode it was in.
    Where processes share a volume (`effseg.parallel.split`) each gives the whole image, computes its rows of
    it and gets the whole result; not with `patch_size`.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if patch_size is None:
                total = image.shape[2]
                rows = slice(*own_rows(total))
                return whole(model.segment(image[:, :, rows].to(device)), total).cpu()
            return _segment_patches(model, image, patch_size, device)
    finally:
        model.train(training)


def keep_largest_components(classes: np.ndarray) -> np.ndarray:
    """`classes` (D, H, W) with all but the largest connected component of every foreground class set to 0.

    Voxels are connected across faces, edges and corners.
    """
    kept = np.zeros_like(classes)
    for index, box in enumerate(ndimage.find_objects(classes.astype(np.int32, copy=False)), start=1):
        if box is None:
            continue
        parts, _ = ndimage.label(classes[box] == index, np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        kept[box][parts == sizes.argmax()] = index
    return kept


def load_predictor(
    checkpoint: Path,
    device: torch.device | str = "cpu",
    *,
    bf16: bool = False,
    largest_component: bool = False,
    preprocessing: Preprocessing | None = None,
    labels: Labels | None = None,
    patch_size: Size | None = None,
) -> Predictor:
    """A predictor from a .safetensors file, or a run's folder (its best network, else its final one).

    preprocessing, labels, patch_size: for a file that does not say them, as one that `model.save` wrote
    without; see `effseg.data.labels.as_label_map`. A file's own are not changed.
    Raises InputError where there is no such file, it lacks what is not given either, says otherwise than what
    is given, or its parts do not fit together.
    """
    path = weights_file(Path(checkpoint))
    model = load(path, device)
    classes = model.arguments["num_classes"]
    found = {key: model.extra.get(key) for key in ("preprocessing", "labels", "training")}
    own = {key: entries if isinstance(entries, dict) else None for key, entries in found.items()}
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


def predict_files(
    predictor: Predictor,
    source: Path,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    writes: bool = True,
    on_case: OnCase | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Segment a scan file, or every scan of a folder, to label files on the scans' own grids.

    output: a folder for NAME.nii.gz, or, for one scan, a file name that ends in .nii.gz or .nii.
    resume: leave label files that this network, with these settings, has made of these scans before.
    writes: False in all but one of the processes that share volumes.
    on_case: told of every file written, with its scan and the seconds it took. say: told what was left.
    Returns the files written.
    Raises InputError before anything is computed where there is no scan, two scans would write one file, or
    an output exists (unless `overwrite`, or finished and `resume`) or is an input. A scan of several that is
    missing or cannot be used does not stop the others: they are written, and then the error names it.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    found = Found([case_of(source)]) if source.is_file() else look_for_cases(source, labelled=False)
    failures = list(found.missing.values())
    targets = _targets(found.cases, source, output) if found.cases else []
    todo = _unfinished(predictor, list(zip(found.cases, targets, strict=True)), overwrite, resume)
    if len(todo) < len(targets):
        say(f"{len(targets) - len(todo)} of {len(targets)} scans were segmented before")
    names = dict(zip(predictor.label_map.values[1:], predictor.label_map.names[1:], strict=True))
    written = []
    for case, target in todo:
        start = time.perf_counter()
        try:
            scan = read_image(case.images)
            labels = predictor(scan)
        except InputError as error:
            failures.append(str(error))
            continue
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            failures.append(f"{case.images[0]}: does not fit in main memory")
            continue
        if not writes:
            continue
        write_labels(target, labels, scan.grid, names, _origin(predictor, case))
        written.append(target)
        if on_case is not None:
            on_case(target, scan, time.perf_counter() - start)
    if failures:
        total = len(found.cases) + len(found.missing)
        many = f"{len(failures)} of {total} scans were not segmented: " if total > 1 else ""
        raise InputError(many + "; ".join(failures))
    return written


def _unfinished(
    predictor: Predictor, pairs: list[tuple[Case, Path]], overwrite: bool, resume: bool
) -> list[tuple[Case, Path]]:
    """What is to be done; raises InputError where a file is in the way."""
    todo = []
    for case, target in pairs:
        exists = target.exists() or target.is_symlink()
        finished = exists and resume and made_by(target) == _origin(predictor, case)
        if exists and not finished and not overwrite:
            why = "--overwrite replaces it"
            if resume:
                why = "and not made of this scan by this network with these settings; " + why
            else:
                why += ", --continue leaves it if it is finished"
            raise InputError(f"{target}: exists already; {why}")
        if not finished:
            todo.append((case, target))
    return todo


def _origin(predictor: Predictor, case: Case) -> str:
    """A checksum of what makes a label file: network, settings, scan."""
    try:
        identity = case_identity(Case(case.name, case.images))
    except InputError:  # reading the scan will say so
        identity = {}
    return checksum(predictor.fingerprint, identity)


def _segment_patches(
    model: SegmentationModel, image: torch.Tensor, patch_size: Size, device: torch.device
) -> torch.Tensor:
    from monai.inferers import SlidingWindowInferer

    inferer = SlidingWindowInferer(
        patch_size,
        overlap=OVERLAP,
        mode="gaussian",
        padding_mode="constant",
        cval=AIR,
        sw_device=device,
        device=torch.device("cpu"),
    )
    logits = inferer(image, model)
    return logits.argmax(1).to(label_dtype(logits.shape[1]))


def weights_file(checkpoint: Path) -> Path:
    """A .safetensors file itself; of a run's folder its best network, else its final one. Raises InputError
    where there is none."""
    if not checkpoint.is_dir():
        if not checkpoint.exists():
            raise InputError(f"{checkpoint}: no such checkpoint or run folder")
        return checkpoint
    for name in ("best.safetensors", "final.safetensors"):
        if (checkpoint / name).is_file():
            return checkpoint / name
    raise InputError(f"{checkpoint}: a folder without best.safetensors or final.safetensors")


def _patch_size(sizes: Sequence[int] | None) -> Size | None:
    if sizes is None:
        return None
    try:
        depth, height, width = map(int, sizes)
    except (TypeError, ValueError):
        raise InputError(f"patch_size: expected three sizes, got {sizes!r}") from None
    return depth, height, width


def _targets(cases: Sequence[Case], source: Path, output: Path) -> list[Path]:
    """Where each case's labels go; raises InputError where one may not go there."""
    if nifti_suffix(output.name) and not output.is_dir():
        if not source.is_file():
            raise InputError(f"{output}: expected a folder, for the scans of {source} go into one")
        targets = [output]
    else:
        if output.exists() and not output.is_dir():
            raise InputError(f"{output}: expected a folder or a name that ends in .nii.gz or .nii")
        targets = [output / f"{case.name}.nii.gz" for case in cases]
    inputs = {image.resolve() for case in cases for image in case.images}
    for target in targets:
        if target.resolve() in inputs:
            raise InputError(f"{target}: is a scan to segment; choose another output")
    folder = next(parent for parent in targets[0].absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{targets[0]}: cannot be written: {folder} is no folder that may be written to")
    return targets


def _channels(count: int) -> str:
    return f"{count} channel" + ("" if count == 1 else "s")
