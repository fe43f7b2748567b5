"""Scans in a folder, named as nnU-Net names them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effseg.data.listing import UNREAD
from effseg.data.nifti import SUFFIXES
from effseg.errors import InputError

OTHERS = (".gipl", ".gipl.gz", ".tif", ".tiff")
"""Endings of volumes that nnU-Net's readers know, beside NIfTI's and those that effseg does not read."""


@dataclass(frozen=True)
class Scan:
    """files: one a channel, in order. target: the output's path without its ending."""

    files: tuple[Path, ...]
    target: Path

    @property
    def name(self) -> str:
        return self.target.name


def list_scans(source: Path, output: Path, ending: str, channels: int) -> list[Scan]:
    """NAME_0000 to NAME_000c of a folder, sorted; NAME in `output`.

    Raises InputError where there is no folder, no scan, or a channel is missing or one too many.
    """
    if not source.is_dir():
        raise InputError(f"-i: expected a folder of scans, got {source}")
    named = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    found: dict[str, list[Path]] = {}
    for path in sorted(source.iterdir()):
        if match := named.fullmatch(path.name):
            found.setdefault(match[1], []).append(path)
    if not found:
        raise InputError(f"{source}: expected scans named NAME_0000{ending}, found none")
    numbers = [f"{index:04d}" for index in range(channels)]
    for name, files in found.items():
        got = [path.name[len(name) + 1 :][:4] for path in files]
        if got != numbers:
            raise InputError(f"{source / name}: expected channels {', '.join(numbers)}, got {', '.join(got)}")
    return [Scan(tuple(files), output / name) for name, files in found.items()]


def not_scans(source: Path, ending: str, scans: Sequence[Scan]) -> list[Path]:
    """Volumes of a folder whose names are none of a scan's: of other formats or in other letters, without a
    channel's number. Not those called like a scan, NAME beside NAME_0000: these are its labels."""
    of_scans = {file.name for scan in scans for file in scan.files} | {scan.name + ending for scan in scans}
    endings = (ending.lower(), *SUFFIXES, *UNREAD, *OTHERS)
    return [
        path
        for path in sorted(source.iterdir())
        if path.name.lower().endswith(endings) and path.name not in of_scans and not path.name.startswith(".")
    ]


def unfinished(scans: Sequence[Scan], ending: str, probabilities: bool) -> list[Scan]:
    """Scans whose labels, or probabilities where asked for, are not in the output yet."""
    endings = (ending, ".npz") if probabilities else (ending,)
    return [
        scan for scan in scans if not all(scan.target.with_name(scan.name + end).is_file() for end in endings)
    ]
