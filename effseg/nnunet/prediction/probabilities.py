"""nnU-Net's file of probabilities, written plane by plane."""

import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from torch import Tensor

from effseg.common.atomic import atomic_path


class ProbabilityFile:
    """NAME.npz with `probabilities` (K, z, y, x) float32, as `nnUNetv2_predict --save_probabilities` has it.

    Planes come in the order of the preprocessed volume's first axis, the file goes class by class: until
    `finish` planes lie uncompressed in a temporary file beside the target, K x volume x 4 bytes.
    Memory: one plane of all classes, or one class of the volume.
    """

    def __init__(
        self,
        target: Path,
        classes: int,
        shape: Sequence[int],
        box: Sequence[Sequence[int]],
        transpose_backward: Sequence[int],
        background: bool,
    ) -> None:
        """shape: of the volume (D, H, W) before the crop to `box`; background: whether class 0 is certain
        around it (otherwise all are impossible there, as of regions)."""
        self.target, self.classes, self.shape = target, classes, tuple(shape)
        self.box, self.backward, self.background = box, tuple(transpose_backward), background
        self._planes = tempfile.TemporaryFile(dir=target.parent)  # noqa: SIM115  closed by __exit__
        self._size = [stop - start for start, stop in box]

    def __enter__(self) -> "ProbabilityFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._planes.close()

    def write(self, index: int, plane: Tensor) -> None:
        """index: of the volume's plane; plane: (K, H, W) of the crop, float32."""
        found = np.ascontiguousarray(plane.cpu().numpy(), np.float32)
        self._planes.seek((index - self.box[0][0]) * found.nbytes)
        self._planes.write(found.data)

    def finish(self) -> None:
        back = [self.shape[axis] for axis in self.backward]
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.classes, *back)}
        with (
            atomic_path(self.target) as path,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("probabilities.npy", "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for index in range(self.classes):
                file.write(np.ascontiguousarray(self._class(index).transpose(self.backward)).data)

    def _class(self, index: int) -> np.ndarray:
        volume = np.full(self.shape, float(self.background and index == 0), np.float32)
        depth, height, width = self._size
        plane_bytes = height * width * 4
        first = self.box[0][0]
        rows, columns = (slice(*bounds) for bounds in self.box[1:])
        for plane in range(depth):
            self._planes.seek((plane * self.classes + index) * plane_bytes)
            found = np.frombuffer(self._planes.read(plane_bytes), np.float32).reshape(height, width)
            volume[first + plane, rows, columns] = found
        return volume
