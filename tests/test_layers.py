"""Imports run down: a room knows only those below it, and no two modules know each other.

import-linter, which is made for this, does not see `effseg.kernels`, a link to a folder without `__init__`.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top down; rooms of one line do not know each other.
LAYERS = [
    ["benchmarks"],
    ["effseg.__main__"],
    ["effseg.cli"],
    ["effseg.commands", "effseg.examples"],
    ["effseg.benchmarking"],
    ["effseg.doctor"],
    ["effseg.nnunet", "effseg.phantom"],
    ["effseg.tuning", "effseg.training"],
    ["effseg.inspection"],
    ["effseg"],
    ["effseg.inference", "effseg.planning"],
    ["effseg.conversion", "effseg.models"],
    ["effseg.modules"],
    ["effseg.memory"],
    ["effseg.functional"],
    ["effseg.operators"],
    ["effseg.algorithms"],
    ["effseg.kernels"],
    ["effseg.criterion"],
    ["effseg.losses", "effseg.figures"],
    ["effseg.evaluation"],
    ["effseg.data"],
    ["effseg.expressions"],
    ["effseg.parallel", "effseg.offload"],
    ["effseg.common"],
    ["effseg.errors", "effseg.version"],
]
UPWARDS: set[tuple[str, str]] = set()
"""Imports that run up all the same, with their reasons."""


def modules() -> dict[str, Path]:
    found = {}
    for top in ("effseg", "benchmarks"):
        paths = [*(ROOT / top).rglob("*.py"), *(ROOT / top / "kernels").glob("*.py")]  # through the link
        for path in paths:
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Of this project, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & set(MODULES)


IMPORTS = {name: imported(path) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    """The longest that its name begins with; "effseg" is the package's face alone."""
    rooms = (r for line in LAYERS for r in line if module == r or module.startswith(f"{r}."))
    longest = max(rooms, key=len, default="")
    return longest if longest != "effseg" or module == "effseg" else ""


def floor(module: str) -> int:
    return next(i for i, line in enumerate(reversed(LAYERS)) if room(module) in line)


def test_every_module_has_a_floor():
    assert [name for name in MODULES if not room(name)] == []


def test_the_link_to_kernels_is_followed():
    assert "effseg.kernels.config" in MODULES


def test_no_two_modules_know_each_other():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_two_rooms_know_each_other():
    rooms = {}
    for name, known in IMPORTS.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in known} - {room(name)})
    try:
        TopologicalSorter(rooms).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_run_down():
    upwards = {
        (name, other)
        for name, known in IMPORTS.items()
        for other in known
        if room(name) != room(other) and floor(other) >= floor(name)
    }
    assert upwards == UPWARDS, "\n".join(f"{a} -> {b}" for a, b in sorted(upwards))
