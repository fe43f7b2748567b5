"""Which value in the label files is which class of the network."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effseg.data.description import DATASET_JSON, MIRROR_PAIRS, description_file, read_json, same_text
from effseg.errors import InputError, InputWarning

__all__ = ["LabelMap", "as_label_map", "label_names", "load_label_map"]

BACKGROUND = "background"
NO_ORGAN = frozenset({BACKGROUND, "air", "bg", "clear label", "empty", "none", "outside", "void"})
"""Names, in small letters, that the value 0 may have in a list of names without values."""
IGNORE = "ignore"
_LARGEST = 65535
_PLANES = 16  # translated at a time, so that what is made on the way stays small


@dataclass(frozen=True)
class LabelMap:
    """Names and file values of the classes 0 (background), 1, 2, ...

    names, values: one a class; values[0] is 0. ignore: the file value of voxels that no loss may count.
    left_out: file values of organs that are known, but are background here.
    Raises InputError for values or names that are not distinct, or no values of label files.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignore: int | None = None
    left_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) != len(self.values) or self.values[:1] != (0,):
            raise InputError(f"label map: expected one value a name and 0 first, found {self.values}")
        if len(self.names) < 2:
            raise InputError("label map: no foreground: expected at least one organ beside the background")
        special = () if self.ignore is None else (self.ignore,)
        known = (*self.values, *special, *self.left_out)
        if any(not 0 <= value <= _LARGEST for value in known) or len(set(known)) != len(known):
            raise InputError(
                f"label map: expected distinct values from 0 to {_LARGEST}, found {sorted(known)}"
            )
        if len(set(self.names)) != len(self.names):
            raise InputError(f"label map: expected distinct names, found {', '.join(self.names)}")

    @property
    def num_classes(self) -> int:
        """Classes, background included."""
        return len(self.names)

    @property
    def dtype(self) -> np.dtype:
        """The type of class arrays: uint8 where the classes and 255 for "ignore" fit, else int16."""
        return np.dtype(np.uint8 if self.num_classes <= (256 if self.ignore is None else 255) else np.int16)

    @property
    def ignore_index(self) -> int | None:
        """The class that stands for `ignore`: the largest number of `dtype`; None without `ignore`."""
        return None if self.ignore is None else int(np.iinfo(self.dtype).max)

    def to_classes(self, array: np.ndarray, source: str | Path = "labels") -> np.ndarray:
        """File values (any shape, any integer dtype) to classes of `dtype`.

        Raises InputError that names `source` where a value is not in the map.
        """
        table = np.full(_LARGEST + 1, -1, np.int32)
        table[list(self.values)] = np.arange(self.num_classes)
        table[list(self.left_out)] = 0
        if self.ignore is not None and self.ignore_index is not None:
            table[self.ignore] = self.ignore_index
        classes = np.empty(array.shape, self.dtype)
        for start in range(0, len(array), _PLANES):
            part = array[start : start + _PLANES]
            if part.min(initial=0) < 0 or part.max(initial=0) > _LARGEST:
                raise InputError(f"{source}: expected label values from 0 to {_LARGEST}")
            found = table[part]
            if np.any(found < 0):
                unknown = int(part[found < 0][0])
                raise InputError(
                    f"{source}: label value {unknown} is not in the label map ({self._describe()})"
                )
            classes[start : start + _PLANES] = found
        return classes

    def to_values(self, classes: np.ndarray) -> np.ndarray:
        """Classes (of any shape) to file values: uint8, or uint16 where a value is above 255.

        `ignore_index` becomes `ignore`. Raises InputError for other numbers that are no class.
        """
        values = self.values if self.ignore is None else (*self.values, self.ignore)
        table = np.zeros(max(self.num_classes, (self.ignore_index or 0) + 1), np.uint16)
        table[: self.num_classes] = self.values
        known = classes < self.num_classes
        if self.ignore is not None:
            table[self.ignore_index] = self.ignore
            known |= classes == self.ignore_index
        known &= classes >= 0
        if not known.all():
            found = classes[~known].flat[0]
            raise InputError(f"classes: expected 0 to {self.num_classes - 1}, found {found}")
        return table.astype(np.uint8 if max(values) <= 255 else np.uint16)[classes]

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, for `from_dict`."""
        return {
            "names": list(self.names),
            "values": list(self.values),
            "ignore": self.ignore,
            "left_out": list(self.left_out),
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "LabelMap":
        """The inverse of `to_dict`. Raises InputError for entries that it does not give."""
        try:
            ignore = entries.get("ignore")
            return cls(
                tuple(str(name) for name in entries["names"]),
                tuple(int(value) for value in entries["values"]),
                None if ignore is None else int(ignore),
                tuple(int(value) for value in entries.get("left_out", ())),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"label map: expected names and values, found {entries}") from error

    def _describe(self) -> str:
        named = [f"{value} {name}" for value, name in zip(self.values, self.names, strict=True)]
        return ", ".join(named if len(named) <= 12 else [*named[:11], f"... {len(named)} classes"])


Labels = LabelMap | Mapping[int, str] | Sequence[str]


def as_label_map(labels: Labels, classes: int) -> LabelMap:
    """A label map of `classes` classes from one, from {value: name}, or from names of the values 0, 1, ...

    The background, value 0, may be left out. Raises InputError where the number of classes is another one, or
    values do not ascend, as classes do.
    """
    if isinstance(labels, LabelMap):
        label_map = labels
    else:
        if isinstance(labels, Mapping):
            named = {int(value): str(name) for value, name in labels.items()}
            if list(named) != sorted(named):
                raise InputError(
                    "labels: expected values that ascend, as the network's classes do, got "
                    + ", ".join(f"{value}:{name}" for value, name in named.items())
                )
        elif isinstance(labels, str):
            raise InputError(f"labels: expected a sequence of names, got {labels!r}")
        else:
            whole = len(labels) == classes
            if whole and str(labels[0]).lower() not in NO_ORGAN:
                raise InputError(
                    f"labels: expected {classes - 1} names, of the classes above background, or {BACKGROUND} "
                    f"first, got {', '.join(map(str, labels))}"
                )
            named = dict(enumerate(map(str, labels), start=0 if whole else 1))
        named = {0: BACKGROUND} | named
        label_map = LabelMap(tuple(named[value] for value in sorted(named)), tuple(sorted(named)))
    if label_map.num_classes != classes:
        raise InputError(
            f"labels: expected {classes} classes, background included, as the network has, got "
            f"{label_map.num_classes} ({', '.join(label_map.names)})"
        )
    return label_map


def load_label_map(folder: str | Path, selection: str | None = None) -> LabelMap:
    """The label map of a data set: from dataset.json (nnU-Net's), else from labels.json.

    labels.json holds {value: name}, or several such groups by name (and "mirror_pairs", see
    `effseg.data.mirroring`). `selection` is "GROUP", "GROUP:organ,organ" or "organ,organ"; organs that are
    left out become background. Classes follow the order of the values. A label named "ignore" is one which
    no loss counts.
    Raises InputError where the file is missing or malformed, has no foreground, or the selection names
    nothing in it. Warns of a value 0 with an organ's name.
    """
    path = description_file(folder)
    groups = _groups(path)
    values, organs = _select(groups, selection, path)
    return _label_map(values, organs, path)


def label_names(folder: str | Path) -> set[str]:
    """All labels of the data set's description, in any group. Raises InputError as `load_label_map`."""
    return {name for group in _groups(description_file(folder)).values() for name in group}


def _groups(path: Path) -> dict[str, dict[str, int]]:
    """{group: {name: value}}; one group without a name where there are none."""
    entries = read_json(path)
    if path.name == DATASET_JSON:
        entries = entries.get("labels") if isinstance(entries, dict) else None
    elif isinstance(entries, dict) and isinstance(entries.get(MIRROR_PAIRS), list):
        del entries[MIRROR_PAIRS]
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected labels as an object of names and values")
    grouped = bool(entries) and all(isinstance(group, dict) for group in entries.values())
    groups = entries if grouped else {"": entries}
    return {same_text(key): _values(group, path) for key, group in groups.items()}


def _values(entries: Mapping[str, Any], path: Path) -> dict[str, int]:
    """{name: value} from {name: value} (nnU-Net) or {value: name}."""
    try:
        if all(re.fullmatch(r"\d+", str(key)) for key in entries):
            values = {same_text(str(name)): int(value) for value, name in entries.items()}
        else:
            values = {same_text(str(name)): _whole(value) for name, value in entries.items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: expected one whole number a label, found {error}") from error
    if len(values) != len(entries):
        raise InputError(f"{path}: expected distinct names of labels, found {', '.join(entries.values())}")
    return values


def _whole(value: Any) -> int:
    if isinstance(value, list):
        raise TypeError(f"a region of {value}")
    if isinstance(value, bool) or not re.fullmatch(r"-?\d+(\.0)?", str(value)):
        raise ValueError(repr(value))
    return int(float(value))


def _select(
    groups: Mapping[str, dict[str, int]], selection: str | None, path: Path
) -> tuple[dict[str, int], list[str]]:
    """The chosen group and the names chosen from it."""
    group, colon, names = same_text(selection or "").partition(":")
    organs = [name.strip() for name in (names if colon else group).split(",") if name.strip()]
    if colon or group in groups:
        if group not in groups:
            raise InputError(f"{path}: no group of labels {group!r}; there are {_listed(groups)}")
        candidates = {group: groups[group]}
        organs = organs if colon else []
    else:
        candidates = {key: values for key, values in groups.items() if set(organs) <= set(values)}
    if len(candidates) > 1:
        raise InputError(f"{path}: holds several groups of labels; choose one of {_listed(groups)}")
    if not candidates:
        known = sorted(set().union(*groups.values()))
        missing = [organ for organ in organs if organ not in known] or organs
        raise InputError(f"{path}: no group has the label {_listed(missing)}; there are {_listed(known)}")
    (values,) = candidates.values()
    unknown = [organ for organ in organs if organ not in values]
    if unknown:
        raise InputError(f"{path}: no label {_listed(unknown)}; there are {_listed(values)}")
    no_organ = [organ for organ in organs if values[organ] == 0 and organ.lower() not in NO_ORGAN]
    if no_organ:
        raise InputError(f"{path}: {_listed(no_organ)} has the value 0, which is the background's")
    return values, organs or list(values)


def _label_map(values: Mapping[str, int], organs: Sequence[str], path: Path) -> LabelMap:
    background = [name for name, value in values.items() if value == 0]
    if any(value == 0 and name.lower() == IGNORE for name, value in values.items()):
        raise InputError(f"{path}: the label 0 must be the background, found {background[0]!r}")
    if background and background[0].lower() not in NO_ORGAN:
        warnings.warn(
            f"{path}: label {background[0]!r} has the value 0, which is the background's: it is not learnt",
            InputWarning,
            stacklevel=2,
        )
    ignore = next((value for name, value in values.items() if name.lower() == IGNORE), None)
    chosen = sorted((value, name) for name, value in values.items() if name in organs)
    chosen = [(value, name) for value, name in chosen if value != 0 and value != ignore]
    kept = {value for value, _ in chosen}
    left_out = sorted(set(values.values()) - kept - {0, ignore})
    try:
        return LabelMap(
            (BACKGROUND, *(name for _, name in chosen)),
            (0, *(value for value, _ in chosen)),
            ignore,
            tuple(value for value in left_out if value is not None),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed if len(listed) <= 12 else [*listed[:11], f"... {len(listed)} in all"])
