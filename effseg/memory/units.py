"""Bytes and volumes as people write them."""

import re

from effseg.errors import InputError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """'24GB' is 24e9 bytes, '24GiB' is 24 * 2**30. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise InputError(f"memory: expected a size like 24GB or 24GiB, got {text!r}")
    return int(float(match[1]) * unit)


def parse_volume(text: str) -> tuple[int, int, int]:
    """'512x512x300' is (512, 512, 300), in voxels. Raises InputError."""
    match = re.fullmatch(r"(\d+)[xX](\d+)[xX](\d+)", text.strip())
    if match is None or 0 in map(int, match.groups()):
        raise InputError(f"--volume: expected three sizes of 1 or more, as in 512x512x300, got {text!r}")
    x, y, z = map(int, match.groups())
    return x, y, z


def format_bytes(count: float) -> str:
    """GiB from half a GiB on, MiB below."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.2f} MiB"
