"""What a folder holds: NIfTI files that can be opened, some that cannot, and volumes in other formats."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from effseg.data.nifti import SUFFIXES
from effseg.errors import InputError

# Formats of volumes that are not read. A folder that holds some holds more cases than it seems to.
UNREAD = (
    ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr", ".img", ".dcm",
    ".nii.bz2", ".nii.xz", ".nii.zst",
)  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """files: NIfTI files, in name order. broken: names of such that cannot be opened, and why. unread:
    volumes in formats that are not read. folders: beside them."""

    files: list[Path] = field(default_factory=list)
    broken: dict[Path, str] = field(default_factory=dict)
    unread: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def nifti_suffix(name: str) -> str:
    """.nii.gz or .nii as `name` writes it, in capitals too; "" where it has none."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[len(name) - len(suffix) :]


def stem(path: Path) -> str:
    """A file's name without its NIfTI suffix."""
    return path.name.removesuffix(nifti_suffix(path.name))


def list_folder(folder: Path) -> Listing:
    """Hidden files are left out, as are those that are no volumes. Raises OSError."""
    found = Listing()
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if nifti_suffix(path.name):
            reason = why_broken(path)
            if reason:
                found.broken[path] = reason
            else:
                found.files.append(path)
        elif path.name.lower().endswith(UNREAD):
            found.unread.append(path)
        elif path.is_dir():
            found.folders.append(path)
    return found


def is_there(path: Path) -> bool:
    """Whether there is a file or folder. Raises InputError for a link that leads nowhere: what it stands for
    is missing, which is not the same as that nobody wanted it."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: {why_broken(path)}")
    return path.exists()


def why_broken(path: Path) -> str:
    """Why `path` cannot be a readable file; "" where it can."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which is not there"
    if not path.exists():
        return "no such file"
    if path.is_dir():
        return "a folder, expected a file"
    if not path.is_file():
        return "no regular file"
    if not os.access(path, os.R_OK):
        return "may not be read"
    if path.stat().st_size == 0:
        return "an empty file"
    return ""
