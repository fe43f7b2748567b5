"""NIfTI files in and out: RAS+ axes inside, the file's own grid outside."""

import json
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Extension
from nibabel.openers import ImageOpener
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import array_from_file
from nibabel.wrapstruct import WrapStructError

from effseg.common.atomic import atomic_path
from effseg.data.grid import Grid
from effseg.errors import DamagedFile, InputError, InputWarning

__all__ = ["Scan", "read_image", "read_labels", "write_labels"]

SUFFIXES = (".nii.gz", ".nii")
LARGEST_LABEL = 65535

_PathLike = str | PathLike[str]
_INT16 = np.iinfo(np.int16)
_DRAIN = 1 << 20
_MOST_DEFLATED = 1032  # times smaller is what deflate makes of zeros
_DAMAGE = (OSError, EOFError, zlib.error, MemoryError, OverflowError)
_LINE_ENDS = ([13, 10, 26, 10], [0, 0, 0, 0])  # in the header, for this check
_LAST_CODE = 5  # of what a qform or sform refers to
_ROUNDING = 1e-4  # what rounding may add to the square of a quaternion's length; 1 degree
_ALIKE = 0.01  # share by which voxel sizes of one header may differ
_WHOLE = 1e-3  # how far a label may lie from a whole number, beside the steps in which the file is stored
_COARSEST = 0.5  # step of label files that is made up for: labels are still told apart


@dataclass(frozen=True, eq=False)
class Scan:
    """One scan of one patient.

    array: (C, X, Y, Z) in RAS+, int16 where every value of every file is whole and fits, else float32;
    for CT in HU. It may be a view that is not contiguous. paths: the files, one a channel.
    """

    array: np.ndarray
    grid: Grid
    paths: tuple[Path, ...]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along X, Y, Z."""
        return self.grid.spacing


def read_image(paths: _PathLike | Sequence[_PathLike]) -> Scan:
    """Read a scan from one NIfTI file a channel: (C, X, Y, Z) in RAS+, the values as the header scales them.

    The grid is that of the NIfTI standard: sform, else qform, with pixdim[0] = 0 taken as 1 and a quaternion
    that rounding has made longer than 1 normalised. With neither, voxel sizes along axes that go left,
    anterior, superior, as nibabel takes them, and an InputWarning, as where pixdim or the qform say otherwise
    than the sform. Metres and microns become mm.
    Raises InputError where a file is missing, damaged, no NIfTI, not 3-D (trailing axes of length 1 are
    dropped), has NaN or infinite voxels, a spacing that is not positive or a singular affine, or where the
    channels' grids differ.
    """
    files = [Path(paths)] if isinstance(paths, str | PathLike) else [Path(path) for path in paths]
    if not files:
        raise InputError("a scan needs at least one file, none was given")
    arrays: list[np.ndarray] = []
    grids: list[Grid] = []
    for file in files:
        raw, scale, grid = _read(file)
        difference = grid.difference(grids[0]) if grids else None
        if difference:
            raise InputError(f"{file}: not on the grid of {files[0]}: {difference}")
        if not grid.oriented:
            warnings.warn(
                f"{file}: its header does not say how the patient lies (qform and sform codes are 0): its"
                " axes are taken to go left, anterior and superior",
                InputWarning,
                stacklevel=2,
            )
        if found := _contradiction(grid):
            warnings.warn(f"{file}: {found}: the sform is taken", InputWarning, stacklevel=2)
        arrays.append(grid.to_ras(_values(raw, *scale, file)))
        grids.append(grid)
    array = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
    return Scan(array, grids[0], tuple(files))


def read_labels(path: _PathLike, like: Scan | Grid | None = None) -> np.ndarray:
    """Read a label file to (X, Y, Z) in RAS+: uint8, or uint16 where a value is above 255.

    Its grid must be that of `like`; another order or direction of the axes on the same grid will do. Values
    within 0.001 of a whole number are that number; where the header scales the file's integers, in steps of
    up to 0.5, half a step more (files written from floating-point labels).
    Raises InputError as `read_image` does, and where the grids differ or a voxel is no whole number from
    0 to 65535, with the voxel's value and its indices in the file.
    """
    path = Path(path)
    raw, scale, grid = _read(path)
    if like is not None:
        expected = like.grid if isinstance(like, Scan) else like
        difference = grid.difference(expected)
        if difference:
            of = like.paths[0] if isinstance(like, Scan) else "the expected grid"
            raise InputError(f"{path}: labels are not on the grid of {of}: {difference}")
    return grid.to_ras(_labels(raw, *scale, path))


def write_labels(
    path: _PathLike,
    labels: np.ndarray,
    grid: Grid,
    names: Mapping[int, str] | None = None,
    made_by: str | None = None,
) -> None:
    """Write labels (X, Y, Z) in RAS+ on the original `grid` as uint8, or uint16 where a value needs it.

    Shape, affine, qform, sform, their codes and the voxel sizes are those of the file that `grid` comes
    from, in mm. `names` (value -> name) goes into the header as a JSON comment, with `made_by` (see
    `effseg.data.origin`). The file is whole or absent.
    Raises InputError where it cannot be written (disk full, no such folder, another suffix), and for labels
    that are no whole numbers from 0 to 65535.
    """
    path = Path(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"{path}: expected a name that ends in .nii.gz or .nii")
    if labels.shape != grid.ras_shape:
        raise ValueError(f"labels: expected shape {grid.ras_shape} in RAS order, got {labels.shape}")
    if labels.dtype.kind not in "biuf":
        raise InputError(f"labels: expected whole numbers, got {labels.dtype}")
    for plane in labels:
        _check_labels(plane)
    header = grid.header.copy()
    header.set_data_offset(0)
    header.set_data_dtype(np.uint8 if labels.max(initial=0) <= 255 else np.uint16)
    header.set_slope_inter(1, 0)
    header.set_intent("label")
    header["cal_min"] = header["cal_max"] = 0
    if names:
        entries: dict[str, Any] = {"labels": {str(value): name for value, name in names.items()}}
        text = json.dumps(entries | ({} if made_by is None else {"made_by": made_by}))
        header.extensions.append(Nifti1Extension("comment", text.encode()))
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    data = grid.from_ras(labels).astype(header.get_data_dtype()).reshape(header.get_data_shape())
    image = image_class(data, grid.affine, header)
    try:
        with atomic_path(path) as temporary:
            image.to_filename(temporary)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _check_labels(plane: np.ndarray) -> None:
    """Raise InputError unless uint16 holds every value as it is."""
    good = (plane >= 0) & (plane <= LARGEST_LABEL)
    if plane.dtype.kind == "f":
        good &= plane == np.rint(plane)
    if not good.all():
        raise InputError(
            f"labels: expected whole numbers from 0 to {LARGEST_LABEL}, found {plane[~good].flat[0]:g}"
        )


def _read(path: Path) -> tuple[np.ndarray, tuple[float, float], Grid]:
    """The file's numbers in the file's axes and Fortran order, what scales them, and their grid."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir() or not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"{path}: expected a NIfTI file (.nii.gz or .nii)")
    with _damage_reported(path), ImageOpener(str(path)) as file:
        header = _mended(_read_header(file, path), path)
        grid = _grid(header, path)
        dtype = _dtype(header, path)
        slope, inter = header.get_slope_inter()
        offset = _offset(header, path)
        _check_size(path, offset + math.prod(grid.shape) * dtype.itemsize)
        # Not through nibabel's image: its checks mend a bad header in silence and log to the screen.
        raw = array_from_file(grid.shape, dtype, file.fobj, offset, order="F", mmap=False)
        while file.read(_DRAIN):  # gzip compares its checksum at the end of the stream
            pass
    return raw, (slope or 1.0, inter or 0.0), grid


def _dtype(header: nib.Nifti1Header, path: Path) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError):
        code = int(header["datatype"])
        raise InputError(
            f"{path}: expected integer or real voxels, found the unknown datatype {code}"
        ) from None
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: expected integer or real voxels, found {dtype}")
    return dtype


def _check_size(path: Path, wanted: int) -> None:
    """No memory is asked for that the file cannot fill."""
    compressed = path.name.lower().endswith(".gz")
    most = path.stat().st_size * (_MOST_DEFLATED if compressed else 1)
    if wanted > most:
        raise InputError(
            f"{path}: damaged, truncated or no NIfTI file: its header wants {wanted} bytes, there are"
            f"{' at most' if compressed else ''} {most}"
        )


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except (*_DAMAGE, HeaderDataError, WrapStructError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedFile(f"{path}: damaged, truncated or no NIfTI file: {reason}") from error


def _read_header(file: ImageOpener, path: Path) -> nib.Nifti1Header:
    block = file.read(nib.Nifti2Header.template_dtype.itemsize)
    for header_class in (nib.Nifti1Header, nib.Nifti2Header):
        if header_class.may_contain_header(block):
            header = header_class(block[: header_class.template_dtype.itemsize], check=False)
            if header["magic"].item() == header_class.single_magic:
                return header
    raise DamagedFile(f"{path}: no NIfTI file: its header is none")


def _mended(header: nib.Nifti1Header, path: Path) -> nib.Nifti1Header:
    """`header` with what the standard, or rounding, leaves open filled in; what is written has it, too."""
    header = header.copy()
    if isinstance(header, nib.Nifti2Header) and header["eol_check"].tolist() not in _LINE_ENDS:
        raise InputError(f"{path}: damaged: its line ends were changed, as of a text")
    header["sizeof_hdr"] = header.sizeof_hdr
    _in_mm(header)
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])  # as nibabel does: a distance has no sign
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1
    for name in ("qform_code", "sform_code"):
        if header[name] > _LAST_CODE:
            raise InputError(f"{path}: expected a {name} from 0 to {_LAST_CODE}, found {int(header[name])}")
        header[name] = max(0, int(header[name]))  # the standard uses those above 0 only
    if header["qform_code"] > 0 and header["sform_code"] == 0:
        names = ("quatern_b", "quatern_c", "quatern_d")
        length = float(np.linalg.norm([np.float64(header[name]) for name in names]))
        if 1 < length**2 <= 1 + _ROUNDING:
            for name in names:
                header[name] /= length
        elif not length <= 1:
            raise InputError(
                f"{path}: expected a qform quaternion (b, c, d) no longer than 1, found {length:g}"
            )
        if header["pixdim"][0] not in (-1, 1):
            found = float(header["pixdim"][0])
            raise InputError(f"{path}: expected 1, -1 or 0 as pixdim[0], found {found:g}")
    return header


def _in_mm(header: nib.Nifti1Header) -> None:
    """Metres and microns become millimetres, as in ITK; a header that does not say is in these already."""
    factor = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7)
    if factor is None:
        return
    header["xyzt_units"] = (int(header["xyzt_units"]) & ~7) | 2
    with np.errstate(all="ignore"):  # what overflows is not finite, which is told later
        header["pixdim"][1:4] *= factor
        for name in ("srow_x", "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z"):
            header[name] = header[name] * factor


def _contradiction(grid: Grid) -> str:
    """In which a header's sform, which counts, and its pixdim or qform differ; "" where they do not."""
    header = grid.header
    if header["sform_code"] == 0:
        return ""
    lengths, sizes = np.linalg.norm(grid.affine[:3, :3], axis=0), header["pixdim"][1:4]
    if not np.allclose(lengths, sizes, rtol=_ALIKE, atol=0):
        by_sform, by_pixdim = (" x ".join(f"{size:g}" for size in found) for found in (lengths, sizes))
        return f"voxels are {by_sform} mm by its sform and {by_pixdim} mm by its pixdim"
    if header["qform_code"] > 0:
        with np.errstate(all="ignore"), suppress(HeaderDataError, ValueError):
            by_qform = io_orientation(header.get_qform())
            if not np.array_equal(by_qform, io_orientation(grid.affine)):
                return "its axes go elsewhere by its sform than by its qform"
    return ""


def whole_size(path: Path) -> int:
    """Bytes that a .nii file must have by its header, at least. Raises InputError for a file that is none."""
    with _damage_reported(path), ImageOpener(str(path)) as file:
        header = _read_header(file, path)
        extents = map(int, header.get_data_shape())
        return _offset(header, path) + math.prod(extents) * header.get_data_dtype().itemsize


def _grid(header: nib.Nifti1Header, path: Path) -> Grid:
    shape = tuple(int(extent) for extent in header.get_data_shape())
    if min(shape, default=0) < 1 or len(shape) < 3 or any(extent != 1 for extent in shape[3:]):
        raise InputError(f"{path}: expected a 3-D volume, found shape {'x'.join(map(str, shape)) or 'none'}")
    sizes = header["pixdim"][1:4]
    if not np.all(np.isfinite(sizes)) or np.any(sizes == 0):
        found = " x ".join(f"{size:g}" for size in sizes)
        raise InputError(f"{path}: expected positive voxel sizes in mm, found {found}")
    with np.errstate(all="ignore"):  # what overflows is not finite
        affine = header.get_best_affine().astype(np.float64)
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.all(np.isfinite([*affine.ravel(), *lengths])):
        raise InputError(f"{path}: the affine in its header holds NaN or infinite numbers")
    singular = not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) <= 1e-6
    if singular or np.isnan(io_orientation(affine)).any():  # NaN: an axis too short to have a direction
        raise InputError(f"{path}: the affine in its header is singular")
    return Grid((shape[0], shape[1], shape[2]), affine, header)


def _offset(header: nib.Nifti1Header, path: Path) -> int:
    offset = float(header["vox_offset"])
    if not offset >= header.single_vox_offset or offset == np.inf:
        first = header.single_vox_offset
        raise InputError(f"{path}: expected voxels from byte {first} on, its header says {offset:g}")
    return int(offset)


def _values(raw: np.ndarray, slope: float, inter: float, path: Path) -> np.ndarray:
    """`raw * slope + inter`, plane by plane: int16 where every value is whole and fits, else float32."""
    if slope == 1 and inter == 0 and raw.dtype.newbyteorder("=") == np.int16:
        return raw.astype(np.int16, copy=False)
    values = np.empty(raw.shape, np.int16, order="F")
    for plane in range(raw.shape[2]):
        scaled = _scaled(raw[..., plane], slope, inter)
        if not (np.all(scaled >= _INT16.min) and np.all(scaled <= _INT16.max) and np.all(scaled % 1 == 0)):
            break
        values[..., plane] = scaled
    else:
        return values
    values = np.empty(raw.shape, np.float32, order="F")
    for plane in range(raw.shape[2]):
        with np.errstate(over="ignore"):  # beyond float32 is told below
            values[..., plane] = _scaled(raw[..., plane], slope, inter)
        if not np.all(np.isfinite(values[..., plane])):
            raise InputError(f"{path}: expected finite voxel values, found NaN or infinite ones")
    return values


def _labels(raw: np.ndarray, slope: float, inter: float, path: Path) -> np.ndarray:
    """`raw * slope + inter` in whole numbers, plane by plane: uint8, or uint16 for values above 255."""
    tolerance = _WHOLE
    if raw.dtype.kind in "iu" and abs(slope) <= _COARSEST:
        tolerance += abs(slope) / 2
    labels = np.empty(raw.shape, np.uint16, order="F")
    for plane in range(raw.shape[2]):
        scaled = _scaled(raw[..., plane], slope, inter)
        whole = np.rint(scaled)
        _demand_all(whole == np.clip(whole, 0, LARGEST_LABEL), "lie from 0 to 65535", scaled, plane, path)
        _demand_all(np.abs(scaled - whole) <= tolerance, "be whole numbers", scaled, plane, path)
        labels[..., plane] = whole
    return labels.astype(np.uint8) if labels.max() <= 255 else labels


def _demand_all(good: np.ndarray, what: str, values: np.ndarray, plane: int, path: Path) -> None:
    if not good.all():
        x, y = np.argwhere(~good)[0]
        raise InputError(f"{path}: labels must {what}, found {values[x, y]:.6g} at voxel ({x}, {y}, {plane})")


def _scaled(plane: np.ndarray, slope: float, inter: float) -> np.ndarray:
    with np.errstate(all="ignore"):  # what is not finite is told by those who look at the values
        return plane.astype(np.float64) * slope + inter
