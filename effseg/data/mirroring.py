"""Which classes change places when a volume is mirrored left to right: told, never read out of names."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from effseg.data.description import DATASET_JSON, MIRROR_PAIRS, description_file, read_json, same_text
from effseg.errors import InputError

NONE = "none"
LARGEST_LABEL = 32767  # classes are uint8 or int16

Pairs = tuple[tuple[int, int], ...]


def described_pairs(folder: str | Path) -> Any:
    """What the description of the data set in `folder` says of pairs; None where it says nothing."""
    path = description_file(folder)
    entries = read_json(path)
    pairs = entries.get(MIRROR_PAIRS) if isinstance(entries, dict) else None
    # labels.json holds labels beside them, and one of these may have that name.
    return pairs if path.name == DATASET_JSON or isinstance(pairs, list) else None


def mirror_pairs(
    names: Sequence[str], given: str | None, described: Any, left_out: Iterable[str] = ()
) -> Pairs:
    """The classes that a mirrored volume exchanges.

    names: of the classes, background first. given: ``A:B,C:D`` (or JSON, [["A", "B"], ...], for names that
    hold a colon or a comma), or "none" where no label has a side; None: `described`, [[name, name], ...] of
    the data set, counts. Pairs of it that are `left_out`, labels which it has and nobody learns, do not.
    Raises InputError where neither says anything, a name is unknown or in two pairs, or one of a pair is not
    learnt: it would be taken for the other one.
    """
    if given is None and described is None:
        raise InputError(
            "mirror: left-right needs to know which labels then change places: --mirror-pairs A:B,C:D, or "
            f"none where no label has a side, or {MIRROR_PAIRS} in dataset.json or labels.json"
        )
    pairs = _parsed(given) if given is not None else described
    if not isinstance(pairs, list):
        raise InputError(f"{MIRROR_PAIRS}: expected a list of pairs of two names, got {pairs!r}")
    others = set(map(same_text, left_out))
    classes = {same_text(name): number for number, name in enumerate(names) if number}
    found: list[tuple[int, int]] = []
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise InputError(f"{MIRROR_PAIRS}: expected pairs of two names, got {pair!r}")
        first, second = (classes.get(same_text(name)) for name in pair)
        if given is None and first is None and second is None and others.issuperset(map(same_text, pair)):
            continue
        if first is None or second is None:
            missing = pair[0] if first is None else pair[1]
            learnt = ", ".join(names[1:])
            raise InputError(f"{MIRROR_PAIRS}: expected labels that are learnt ({learnt}), got {missing!r}")
        found.append((first, second))
    members = [number for pair in found for number in pair]
    twice = next((names[number] for number in members if members.count(number) > 1), None)
    if twice is not None:
        raise InputError(f"{MIRROR_PAIRS}: expected every label once, got {twice!r} twice")
    return tuple(found)


def _parsed(given: str) -> Any:
    text = given.strip()
    if text.lower() == NONE:
        return []
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise InputError(f"{MIRROR_PAIRS}: not readable as JSON: {error}") from error
    return [[name.strip() for name in pair.split(":")] for pair in text.split(",")]


def exchange(parts: Iterable[torch.Tensor], pairs: Pairs) -> None:
    """Let pairs of classes change places in parts of labels, in place: an index is eight bytes a voxel."""
    if not pairs:
        return
    table: torch.Tensor | None = None  # one for all parts, where they are
    for part in parts:
        table = _exchanged(pairs, part) if table is None else table
        part.copy_(table[part.long()])


def _exchanged(pairs: Pairs, like: torch.Tensor) -> torch.Tensor:
    """The class that takes each one's place."""
    table = torch.arange(LARGEST_LABEL + 1, dtype=torch.int32, device=like.device)
    for first, second in pairs:
        table[first], table[second] = second, first
    return table.to(like.dtype)
