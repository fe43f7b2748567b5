"""Which network, with which settings, made a label file of which scan: a checksum in the file's header."""

import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

ENTRY = "made_by"  # beside "labels" in the JSON comment that `effseg.data.nifti.write_labels` writes


def checksum(*parts: Any) -> str:
    """Of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def made_by(path: Path) -> str | None:
    """The checksum in the header of a label file; None for a file that has none or cannot be read, or holds
    other voxels than labels: a scan that was saved under a label file's header has its checksum, too."""
    try:
        image: Any = nib.load(path)
        scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
        if scaled or image.get_data_dtype() not in (np.uint8, np.uint16):
            return None
        texts = [
            extension.get_content() for extension in image.header.extensions if extension.get_code() == 6
        ]
        entries = [json.loads(text) for text in texts]
    except Exception:  # any file may lie there, and nibabel's errors are of many kinds
        return None
    return next((entry[ENTRY] for entry in entries if isinstance(entry, dict) and ENTRY in entry), None)
