"""Where a part of a volume enters a network: processes agree on what they are about to do."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from torch import Tensor

from effseg.errors import InputError
from effseg.parallel.partition import Split, current


def whole_rows(image: Tensor, settings: str = "") -> int:
    """Rows D of the volume of which `image` (N, C, d, H, W) is this process's part; d where none is split.

    settings: what every process's network must agree on. One small message to all. Raises `InputError` in
    every process where shapes, types or settings differ, or rows are not those of `effseg.parallel.rows`.
    """
    split = current()
    if split is None:
        return int(image.shape[2])
    n, c, _, h, w = image.shape
    texts = (zlib.crc32(text.encode()) for text in (str(image.dtype), settings))
    return _agreed(split, split.transport.tell(image, [n, c, h, w, *texts]))


def _agreed(split: Split, everyone: Sequence[Sequence[int]]) -> int:
    first = everyone[0]
    for rank, (_, n, c, h, w, dtype, settings) in enumerate(everyone):
        got, expected = (n, c, h, w), tuple(first[1:5])
        if got != expected:
            raise InputError(
                f"image: expected (N, C, H, W) = {expected} in process {rank} of the volume as in the first, "
                f"got {got}"
            )
        if dtype != first[5]:
            raise InputError(f"image: expected one type in all processes of a volume, process {rank} differs")
        if settings != first[6]:
            raise InputError(
                f"settings: expected the same network, mode and options in all processes of a volume, "
                f"process {rank} differs from the first"
            )
    found = [one[0] for one in everyone]
    total = sum(found)
    shares = [hi - lo for lo, hi in (split.rows(total, rank) for rank in range(split.size))]
    if found != shares or min(found) < 1:
        raise InputError(
            f"image: expected the rows of effseg.parallel.rows, {shares} of {total} in the order of "
            f"processes, got {found}"
        )
    return total
