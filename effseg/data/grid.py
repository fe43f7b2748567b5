"""The voxel grid of a NIfTI file, and its way to RAS+ axes and back."""

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

RAS = np.array([[0, 1], [1, 1], [2, 1]])
AGREEMENT = 0.05  # of the smallest spacing: what rounding in headers may move a corner of the volume


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of one file lie.

    shape: of the file's volume, without trailing axes of length 1.
    affine: (4, 4) float64, voxel indices of the file to RAS+ millimetres; not singular.
    header: the file's NIfTI-1 or NIfTI-2 header as it was read; treat as read-only.

    The axes of an oblique grid go to those of RAS+ which they are closest to, as in nibabel's
    `as_closest_canonical`: voxels are permuted and flipped, never resampled.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    header: nib.Nifti1Header

    @property
    def oriented(self) -> bool:
        """Whether the header says how the patient lies, in a qform or sform."""
        return bool(self.header["qform_code"] > 0 or self.header["sform_code"] > 0)

    @property
    def orientation(self) -> np.ndarray:
        """(3, 2): for each axis of the file the RAS+ axis it becomes, and 1 or -1 for its direction."""
        return io_orientation(self.affine)

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        shape = [0, 0, 0]
        for extent, axis in zip(self.shape, self.orientation[:, 0], strict=True):
            shape[int(axis)] = extent
        return shape[0], shape[1], shape[2]

    @property
    def ras_affine(self) -> np.ndarray:
        """(4, 4): indices of the reoriented array to RAS+ millimetres."""
        return self.affine @ inv_ornt_aff(self.orientation, self.shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels in mm along the axes of the reoriented array."""
        x, y, z = np.linalg.norm(self.ras_affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    def to_ras(self, array: np.ndarray) -> np.ndarray:
        """A view of `array`, which has the file's shape, with its axes in RAS+ order."""
        return apply_orientation(array, self._turned())

    def from_ras(self, array: np.ndarray) -> np.ndarray:
        """A view of `array`, which has `ras_shape`, with its axes in the file's order."""
        return apply_orientation(array, ornt_transform(RAS, self._turned()))

    def _turned(self) -> np.ndarray:
        """The orientation, with axes of one voxel never reversed: their views would have a negative stride,
        which `np.ascontiguousarray` leaves and torch refuses."""
        orientation = np.array(self.orientation)
        orientation[np.array(self.shape) == 1, 1] = 1
        return orientation

    def difference(self, other: "Grid") -> str | None:
        """What tells the two grids apart once both are in RAS+, in words; None where they agree."""
        if self.ras_shape != other.ras_shape:
            return f"shape {_by(self.ras_shape)} against {_by(other.ras_shape)} (axes in RAS order)"
        ends = np.array([(0, extent - 1) for extent in self.ras_shape])
        corners = np.stack([*np.meshgrid(*ends, indexing="ij"), np.ones((2, 2, 2))]).reshape(4, 8)
        moved = np.linalg.norm(((self.ras_affine - other.ras_affine) @ corners)[:3], axis=0).max()
        if moved > AGREEMENT * min(self.spacing):
            return f"the affines put a corner of the volume {moved:.3g} mm apart"
        return None


def _by(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
