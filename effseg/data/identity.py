"""What a case's files were: to tell later whether they are still the same."""

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nibabel.openers import ImageOpener

from effseg.data.cases import Case
from effseg.errors import DamagedFile

HEADER_BYTES = 544  # of NIfTI-2 with the flag of extensions, the longer one
BLOCKS, BLOCK_BYTES = 64, 4096


def case_identity(case: Case) -> dict[str, Any]:
    """{"images": one entry a channel, "labels": an entry or None}, for JSON.

    Of a compressed scan, which is large: its size in bytes, checksums of its header and of 64 blocks spread
    over the file, the last of which holds gzip's own checksum of all. Of others and of labels: their size and
    a checksum of the whole file. Names and times do not count.
    Raises DamagedFile for a file that cannot be read.
    """
    images = [_read(_scan_identity, path) for path in case.images]
    return {"images": images, "labels": None if case.labels is None else _read(_file_identity, case.labels)}


def _read(identity: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    try:
        return identity(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DamagedFile(f"{path}: damaged, or cannot be read: {reason}") from error


def header_bytes(path: Path) -> bytes:
    """The first bytes of a NIfTI file, uncompressed. Raises OSError, EOFError or zlib.error."""
    with ImageOpener(str(path)) as file:
        found: bytes = file.read(HEADER_BYTES)
    return found


def _scan_identity(path: Path) -> dict[str, Any]:
    if not path.name.lower().endswith(".gz"):
        return _file_identity(path)
    size = path.stat().st_size
    header = header_bytes(path)
    blocks = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek(max(0, size - BLOCK_BYTES) * number // (BLOCKS - 1))
            blocks.update(file.read(BLOCK_BYTES))
    return {"bytes": size, "header": hashlib.sha256(header).hexdigest(), "blocks": blocks.hexdigest()}


def _file_identity(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
