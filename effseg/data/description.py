"""The JSON files that describe a data set: dataset.json (nnU-Net's), labels.json."""

import contextlib
import json
import unicodedata
from pathlib import Path
from typing import Any

from effseg.data.listing import is_there
from effseg.errors import InputError

DATASET_JSON = "dataset.json"
FILES = (DATASET_JSON, "labels.json")
MIRROR_PAIRS = "mirror_pairs"  # an entry of either: [[name, name], ...], see `effseg.data.mirroring`


def description_file(folder: str | Path) -> Path:
    """`folder`/dataset.json, else `folder`/labels.json. Raises InputError where neither is there."""
    for name in FILES:
        path = Path(folder) / name
        if is_there(path):
            return path
    raise InputError(f"{folder}: expected a dataset.json or labels.json with the labels' names")


def read_json(path: Path) -> Any:
    """What the UTF-8 file holds; a byte order mark, as some editors write, is no part of it.

    Raises InputError where it cannot be read, or an object has an entry twice, of which one would be lost.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error


def _once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(entries)
    if len(found) != len(entries):
        keys = [key for key, _ in entries]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def same_text(text: str) -> str:
    """One spelling for all that look alike: an umlaut may be one character or two (NFC, NFD), or, in the
    arguments and file names of a process whose locale is ASCII, two bytes that Python could not read."""
    with contextlib.suppress(UnicodeError):  # bytes that are no UTF-8 stay as they are
        text = text.encode("utf-8", "surrogateescape").decode("utf-8")
    return unicodedata.normalize("NFC", text)
