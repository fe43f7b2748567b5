"""Some of many names, as people write them: names, ranges, patterns."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from effseg.data.description import same_text
from effseg.errors import InputError


def select_names(names: Iterable[str], selection: str | None) -> list[str]:
    """Those of `names` that a comma-separated `selection` names, in order.

    A term is a name, a range FIRST-LAST in name order (both must exist) or a pattern with shell wildcards.
    Raises InputError where a term names no case. None selects all.
    """
    names = sorted(names)
    if selection is None:
        return names
    chosen: set[str] = set()
    for term in _terms(selection):
        found = _named(names, term)
        if not found:
            raise InputError(f"no case {term!r}; there are {listed(names)}")
        chosen.update(found)
    if not chosen:
        raise InputError(f"expected names of cases, found {selection!r}")
    return [name for name in names if name in chosen]


def selects_by_name(names: Iterable[str], selection: str | None) -> bool:
    """Whether every term of `selection` is the name of a case, so that it depends on no other case."""
    known = set(map(same_text, names))
    return selection is not None and all(same_text(term) in known for term in _terms(selection))


def listed(names: Iterable[str]) -> str:
    """All of a few, the first of many."""
    every = list(names)
    return ", ".join(every if len(every) <= 12 else [*every[:11], f"... {len(every)} in all"])


def _terms(selection: str) -> list[str]:
    return [term for term in map(str.strip, selection.split(",")) if term]


def _named(names: Sequence[str], term: str) -> list[str]:
    known = {same_text(name): name for name in names}
    term = same_text(term)
    if term in known:
        return [known[term]]
    if any(character in term for character in "*?["):
        return [name for name in names if fnmatchcase(same_text(name), term)]
    for hyphen in (index for index, character in enumerate(term) if character == "-"):
        first, last = known.get(term[:hyphen].strip()), known.get(term[hyphen + 1 :].strip())
        if first is not None and last is not None:
            return list(names[names.index(first) : names.index(last) + 1])
    return []
