"""Options that several commands have."""

import argparse
from typing import Any

from effseg.errors import InputError


def add_window(group: argparse._ArgumentGroup, meaning: str) -> None:
    """--window LOW HIGH, repeated for channels. meaning: of the limits, for people."""
    group.add_argument("--window", type=float, nargs=2, action="append", metavar="HU", help=meaning)


def window(values: list[list[float]] | None) -> Any:
    """One window, one for each channel, or None where the option is not given."""
    if values is None or len(values) > 1:
        return values
    return values[0]


def add_spacing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--spacing",
        type=float,
        nargs="+",
        metavar="MM",
        help="voxel size in mm to resample to, one number or three (right, anterior, superior axis; "
        "default: each scan's own)",
    )


def three(values: list[Any] | None, name: str) -> Any:
    """One number stands for three. Raises InputError for another number of them."""
    if values is None or len(values) == 3:
        return None if values is None else tuple(values)
    if len(values) != 1:
        raise InputError(f"{name}: expected one number or three, got {len(values)}")
    return tuple(values * 3)
