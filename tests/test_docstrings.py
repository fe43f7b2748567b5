"""Every public name says what it is, in which shapes and units, and what it raises.

Public are the names of `__all__` of the modules below, and the methods and properties of public
classes that have no underscore. A method may leave shapes, units and errors to its class, whose
docstring is read along with its own; the `forward` of a network, which is the class's equation,
all of it. Operators, losses and layers give their equation.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

MODULES = (
    "effseg", "effseg.conversion", "effseg.data.cases", "effseg.data.labels", "effseg.data.nifti",
    "effseg.data.preprocessing", "effseg.evaluation.folders", "effseg.figures", "effseg.functional",
    "effseg.inference", "effseg.losses", "effseg.memory", "effseg.models.registry", "effseg.nnunet",
    "effseg.phantom", "effseg.planning", "effseg.training",
)  # fmt: skip
NO_SUBJECT = ("Of", "As", "In", "For", "From", "With", "On", "By", "At", "To")
TENSOR = re.compile(r"\b(Tensor|ndarray|Deferred|Labels|Scan)\b")
SHAPE = re.compile(r"\([\dA-Za-z.][\w.']*,[\w\s.,'*+/-]*\)|\bscalars?\b|\bshape\b")
UNITS = {
    r"spacing|margin|tolerance_mm|^threshold_mm$": r"\bmm\b",
    r"^window$|^threshold$": r"\bHU\b",
    r"budget|^gpu_memory$|^peak$|^reserved$|nbytes|^usable$": r"\bbytes\b",
    r"^seconds$|^minutes$": r"\b(seconds|minutes)\b",
}
CHECKS = re.compile(r"^_?(check|expect|checks|refuse)(_|\b|$)")
ERRORS = re.compile(r"\b([Rr]aises?|InputError|ValueError|TypeError|RuntimeError|FileNotFoundError)\b")
EQUATION = re.compile(r"=|\w\(\w.*\)| / | \* | - |->")
COMPUTES = ("effseg.functional", "effseg.losses", "effseg.modules", "effseg.criterion")


class Public(NamedTuple):
    """name: as users write it; thing: a class, function or getter; around: the class of a method."""

    name: str
    thing: Any
    around: Any = None

    @property
    def doc(self) -> str:
        return inspect.cleandoc(self.thing.__doc__ or "")

    @property
    def with_class(self) -> str:
        return (
            self.doc if self.around is None else f"{self.doc}\n{inspect.cleandoc(self.around.__doc__ or '')}"
        )


def public() -> Iterator[Public]:
    seen = set()
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.ismodule(thing) or not callable(thing) or id(thing) in seen:
                continue
            seen.add(id(thing))
            yield Public(f"{module.__name__}.{name}", thing)
            if inspect.isclass(thing):
                for member, value in vars(thing).items():
                    got = getattr(value, "fget", None) or getattr(value, "__func__", value)
                    if not member.startswith("_") and inspect.isfunction(got):
                        yield Public(f"{module.__name__}.{name}.{member}", got, thing)


NAMES = list(public())


def parameters(entry: Public) -> dict[str, str]:
    """Names and annotations: of a function's arguments and result, of a dataclass's or a tuple's fields."""
    function = entry.thing
    if inspect.isclass(function):
        fields = dict(vars(function).get("__annotations__", {}))
        init = vars(function).get("__init__")
        if inspect.isfunction(init):
            fields |= init.__annotations__
        return {name: str(kind) for name, kind in fields.items() if not name.startswith("_")}
    function = inspect.unwrap(function)
    return {name: str(kind) for name, kind in getattr(function, "__annotations__", {}).items()}


def raises(entry: Public) -> bool:
    """Whether the code says `raise`, or calls what checks arguments."""
    functions = [entry.thing]
    if inspect.isclass(entry.thing):
        functions = [vars(entry.thing)[n] for n in ("__init__", "__post_init__") if n in vars(entry.thing)]
    for function in functions:
        try:
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        except (OSError, TypeError):  # made by dataclasses
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and node.exc is not None:
                return True
            if isinstance(node, ast.Call):
                called = node.func
                while isinstance(called, ast.Attribute) and not CHECKS.match(called.attr):
                    called = called.value
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if CHECKS.match(name):
                    return True
    return False


def faults(entry: Public) -> list[str]:
    if entry.around is not None and entry.name.endswith(".forward"):
        return [] if entry.with_class.strip() else ["no docstring"]
    if not entry.doc:
        return ["no docstring"]
    found = []
    first = re.split(r"\W", entry.doc, maxsplit=1)[0]
    if first in NO_SUBJECT:
        found.append(f"begins with {first!r}, not with its subject")
    given = {name: kind for name, kind in parameters(entry).items() if "Callable" not in kind}
    if any(TENSOR.search(kind) for kind in given.values()) and not SHAPE.search(entry.with_class):
        found.append(f"names no shape of {[n for n, kind in given.items() if TENSOR.search(kind)]}")
    for names, unit in UNITS.items():
        of_unit = [name for name in given if re.search(names, name) and given[name] != "Window"]
        if of_unit and not re.search(unit, entry.with_class):
            found.append(f"names no unit of {of_unit}")
    if raises(entry) and not ERRORS.search(entry.with_class):
        found.append("does not say what it raises")
    computes = inspect.getmodule(entry.thing).__name__ in COMPUTES and entry.around is None
    if computes and not EQUATION.search(entry.doc):
        found.append("gives no equation")
    return found


@pytest.mark.parametrize("entry", NAMES, ids=[entry.name for entry in NAMES])
def test_docstring(entry):
    assert faults(entry) == []


# The checks themselves


def spaced(spacing: float) -> None:
    """Of a thing."""
    raise ValueError


def test_faults_are_found():
    assert faults(Public("spaced", spaced)) == [
        "begins with 'Of', not with its subject",
        "names no unit of ['spacing']",
        "does not say what it raises",
    ]
