"""`effseg.nnunet.Predictor`: labels of a trained nnU-Net, in memory that does not grow with its classes."""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effseg.common.atomic import atomic_folder, atomic_path
from effseg.common.device import find_device
from effseg.errors import InputError
from effseg.nnunet.prediction.cases import Scan, list_scans, not_scans, unfinished
from effseg.nnunet.prediction.export import LabelVolume, grid_axes
from effseg.nnunet.prediction.folder import Folds, load_model
from effseg.nnunet.prediction.preprocessing import Properties, prepare, read, read_labels
from effseg.nnunet.prediction.probabilities import ProbabilityFile
from effseg.nnunet.prediction.slabs import Ensemble, Slabs
from effseg.nnunet.prediction.windows import Windows, padded

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}
BATCH_ON_GPU = 4  # windows; halved where they do not fit

Tell = Callable[[str, int, int], None]


class Predictor:
    """A trained nnU-Net model, loaded once, for any number of scans.

    model: folder TRAINER__PLANS__CONFIGURATION of nnU-Net v2 (3d_fullres, 3d_lowres, 2d, or the second stage
        of a cascade, which needs the labels of the first one), of one of nnU-Net's trainers or
        nnUNetTrainerEffSeg; its weights are read without executing anything in them.
    folds: numbers or "all", whose logits are averaged; by default every numbered fold there is.
    checkpoint: name of the file of weights in the folds' folders.
    device: "auto", "cpu", "cuda" or "cuda:N".
    step: distance of neighbouring windows as a share of their size, more than 0 and at most 1.
    mirror: average over mirrored windows, along the axes that the model was trained with.
    dtype: "fp16" or "bf16" under autocast, or "fp32"; by default nnU-Net's, fp16 on a GPU, else fp32.
    batch: windows at a time; by default 4 on a GPU, 1 on a CPU.
    on_device: hold the sums of logits on the GPU, if they fit.
    compiled: run the networks through torch.compile.
    converted: run 3D networks on this package's operators.

    Labels are those of `nnUNetv2_predict` but for voxels where two classes' logits agree to the precision of
    its float16 sums; sums here are float32. They are held for as many planes as a window is thick, K x d x H
    x W x 4 bytes; planes that are done are brought to the scan's own spacing and become labels at once.
    Raises InputError, in one line, for a model that cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        folds: Folds | None = None,
        checkpoint: str = "checkpoint_final.pth",
        *,
        device: str = "auto",
        step: float = 0.5,
        mirror: bool = True,
        dtype: str = "auto",
        batch: int | None = None,
        on_device: bool = True,
        compiled: bool = False,
        converted: bool = True,
    ) -> None:
        if not 0 < step <= 1:
            raise InputError(f"step: expected more than 0 and at most 1, got {step}")
        if batch is not None and batch < 1:
            raise InputError(f"batch: expected 1 or more, got {batch}")
        self.device, self.step, self.on_device = find_device(device), step, on_device
        on_gpu = self.device.type == "cuda"
        self.batch = batch or (BATCH_ON_GPU if on_gpu else 1)
        self.model = load_model(Path(model), folds, checkpoint, self.device, converted and not compiled)
        networks: list[Any] = self.model.networks
        if compiled:
            networks = [torch.compile(one) for one in networks]
        axes = self.model.mirror_axes if mirror else ()
        self.ensemble = Ensemble(networks, axes, _dtype(dtype, on_gpu), self.model.previous)
        self.reader = self.model.plans.image_reader_writer_class()

    def __call__(
        self, image: np.ndarray, spacing: Sequence[float], previous: np.ndarray | None = None
    ) -> np.ndarray:
        """Labels (z, y, x), uint8 or uint16, of a scan (C, z, y, x) with its spacing along z, y, x in mm.

        Axes as nnU-Net's readers give them: for a NIfTI file the reverse of nibabel's. previous: labels
        (z, y, x) that the previous stage of a cascade has given.
        """
        found = np.array(image, np.float32)
        if found.ndim != 4 or len(spacing) != 3 or not all(step > 0 for step in spacing):
            raise InputError(
                f"image: expected (C, z, y, x) and three spacings, got {found.shape} and {spacing}"
            )
        self._check_previous(previous is not None)
        data, properties = self._prepare(found, {"spacing": [float(step) for step in spacing]}, previous)
        return self.segment(data, properties)

    def predict_file(
        self,
        files: Sequence[str | Path],
        probabilities: Path | None = None,
        previous: str | Path | None = None,
    ) -> np.ndarray:
        """Labels (z, y, x) of one scan, a file a channel; with `probabilities` also NAME.npz there; previous:
        file of the labels that the previous stage of a cascade has given."""
        data, properties = self.read(
            [Path(file) for file in files], None if previous is None else Path(previous)
        )
        return self.segment(data, properties, probabilities)

    def predict_folder(
        self,
        source: str | Path,
        output: str | Path,
        *,
        save_probabilities: bool = False,
        resume: bool = False,
        part: int = 0,
        parts: int = 1,
        ahead: bool = True,
        tell: Tell | None = None,
        previous: str | Path | None = None,
    ) -> list[Path]:
        """Segment every scan NAME_0000 of a folder to NAME in another, and return the files written.

        save_probabilities: NAME.npz and NAME.pkl too, as nnU-Net has them. resume: leave what is there.
        part, parts: only every `parts`-th scan, from number `part` on. ahead: read the next scan and write
        the last one meanwhile. previous: folder of the labels NAME that the previous stage of a cascade has
        given. tell: called with a scan's name, windows done, and windows in all.
        A scan that cannot be used, or has another name, does not stop the others: they are written, and then
        InputError names it.
        """
        source, output = Path(source), Path(output)
        if not 0 <= part < parts:
            raise InputError(f"part_id: expected 0 to {parts - 1}, got {part}")
        self._check_previous(previous is not None)
        ending = self.model.dataset["file_ending"]
        channels = len(self.model.configuration.normalization_schemes)
        scans = list_scans(source, output, ending, channels)
        failures: list[str] = []
        if part == 0:
            failures = [
                f"{path}: expected the name NAME_0000{ending}" for path in not_scans(source, ending, scans)
            ]
        scans = scans[part::parts]
        if resume:
            scans = unfinished(scans, ending, save_probabilities)
        total = len(scans) + len(failures)
        self._describe(output)

        def read(scan: Scan) -> tuple[Tensor, Properties]:
            labels = None if previous is None else Path(previous) / (scan.name + ending)
            return self.read(scan.files, labels)

        written: list[Path] = []
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
            pending: Future[Path] | None = None
            for scan, prepared in _ahead(scans, read, reading, ahead):
                try:
                    data, properties = prepared.pop().result()
                    npz = scan.target.with_name(scan.name + ".npz") if save_probabilities else None
                    labels = self.segment(data, properties, npz, _named(tell, scan.name))
                except InputError as error:
                    failures.append(
                        str(error) if str(scan.files[0]) in str(error) else f"{scan.files[0]}: {error}"
                    )
                    continue
                del data
                if pending is not None:
                    written.append(pending.result())
                pending = writing.submit(self._write, scan, labels, properties, save_probabilities)
                if not ahead:
                    pending.result()
            if pending is not None:
                written.append(pending.result())
        if failures:
            raise InputError(f"{len(failures)} of {total} scans were not segmented: {'; '.join(failures)}")
        return written

    def read(self, files: Sequence[Path], previous: Path | None = None) -> tuple[Tensor, Properties]:
        """A scan as the network expects it, (C, D, H, W) float32 on the CPU, and nnU-Net's properties; with
        `previous`, a file, the labels in it are another channel."""
        self._check_previous(previous is not None)
        image, properties = read(self.reader, files)
        labels = None if previous is None else read_labels(self.reader, previous)
        try:
            return self._prepare(image, properties, labels)
        except InputError as error:
            raise InputError(f"{files[0]}: {error}") from None

    def _prepare(
        self, image: np.ndarray, properties: Properties, previous: np.ndarray | None
    ) -> tuple[Tensor, Properties]:
        return prepare(image, properties, self.model.plans, self.model.configuration, previous)

    def _check_previous(self, given: bool) -> None:
        stage = self.model.configuration.previous_stage_name
        if given and stage is None:
            raise InputError("previous stage: expected no labels, the model is no second stage of a cascade")
        if not given and stage is not None:
            raise InputError(
                f"previous stage: expected labels of the scans by {stage}, the first stage of this cascade "
                f"(-prev_stage_predictions FOLDER), got none"
            )

    @torch.inference_mode()
    def segment(
        self,
        data: Tensor,
        properties: Properties,
        probabilities: Path | None = None,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> np.ndarray:
        """Labels (z, y, x) on the scan's own grid, of what `read` has given. tell: windows done, in all."""
        model = self.model
        axes = grid_axes(data.shape[1:], properties, model.plans, model.configuration)
        data, inside = padded(data, model.configuration.patch_size)
        depth, height, width = data.shape[1:]
        windows = Windows((depth, height, width), tuple(model.configuration.patch_size), self.step)
        slabs = Slabs(windows, self.ensemble, self.device, self.batch, self.on_device)
        done = 0

        def count(number: int) -> None:
            nonlocal done
            done += number
            tell(done, len(slabs))

        with ExitStack() as stack:
            file = None
            if probabilities is not None:
                file = stack.enter_context(self._probability_file(probabilities, properties))
            write = None if file is None else file.write
            labels = LabelVolume(axes, inside, properties, model.labels, write)
            for index, logits in slabs.planes(data, model.classes, count):
                labels.push(index, logits)
            if file is not None:
                file.finish()
        return labels.volume.transpose(model.plans.transpose_backward)

    def _probability_file(self, target: Path, properties: Properties) -> ProbabilityFile:
        return ProbabilityFile(
            target,
            self.model.classes,
            properties["shape_before_cropping"],
            properties["bbox_used_for_cropping"],
            self.model.plans.transpose_backward,
            not self.model.labels.has_regions,
        )

    def _write(
        self, scan: Scan, labels: np.ndarray, properties: Properties, save_probabilities: bool
    ) -> Path:
        if save_probabilities:
            with atomic_path(scan.target.with_name(scan.name + ".pkl")) as path, path.open("wb") as file:
                pickle.dump(properties, file)
        target = scan.target.with_name(scan.name + self.model.dataset["file_ending"])
        with atomic_folder(target.parent) as folder:  # some writers make a second file: the spacing of a TIFF
            self.reader.write_seg(labels, str(folder / target.name), properties)
        return target

    def _describe(self, output: Path) -> None:
        """What nnU-Net's evaluation and postprocessing look for beside predictions."""
        output.mkdir(parents=True, exist_ok=True)
        for name, content in (("dataset.json", self.model.dataset), ("plans.json", self.model.plans.plans)):
            with atomic_path(output / name) as path:
                path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def _ahead(
    scans: Sequence[Scan], function: Callable[[Scan], Any], pool: ThreadPoolExecutor, ahead: bool
) -> Iterator[tuple[Scan, list[Future[Any]]]]:
    """Every scan with function(scan), in a list for the caller to empty, so that nothing else holds it.

    Meanwhile the next one, and no more, is begun in the pool.
    """
    begun: list[Future[Any]] = []
    for index, scan in enumerate(scans):
        current = begun or [pool.submit(function, scan)]
        wait(current)
        later = scans[index + 1 : index + 2] if ahead else ()
        begun = [pool.submit(function, one) for one in later]
        yield scan, current


def _named(tell: Tell | None, name: str) -> Callable[[int, int], None]:
    return (lambda done, total: None) if tell is None else (lambda done, total: tell(name, done, total))


def _dtype(name: str, on_gpu: bool) -> torch.dtype | None:
    if name == "auto":
        name = "fp16" if on_gpu else "fp32"
    if name not in DTYPES:
        raise InputError(f"dtype: expected auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
