"""Code blocks of Markdown pages, and what it means that one of them runs.

Python blocks of a page are executed one after the other, in one namespace, in a folder with the
data of `make_world`. A block that needs nnU-Net where it is not installed is compiled, runs up to
where it needs it, and its imports from effseg are looked up.

Shell blocks are read command by command. `effseg predict`, `evaluate` and `doctor` are run as
they stand, on the data of `make_world`. All others take hours, minutes, a GPU, the network or nnU-Net,
so of them is checked what can go wrong in a page: effseg's by the command line's own parser;
pip's paths and extras; pytest's options by pytest's parser; modules and scripts are there and
know the options.

Text blocks are pictures. No other kind of block exists, and none is exempt.
"""

import ast
import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from effseg import EffSegNet, cli, phantom
from effseg.commands import nnunet_predict
from effseg.data.labels import load_label_map
from effseg.data.preprocessing import Preprocessing

ROOT = Path(__file__).parents[1]
LANGUAGES = ("python", "bash", "text")
RUN = ("predict", "evaluate", "doctor")
"""Commands that are quick on a CPU."""
OPTIONAL = "nnunetv2"
NNUNET_MODEL = Path("Dataset001_X") / "nnUNetTrainer__nnUNetPlans__3d_fullres"


class Block(NamedTuple):
    """line: of its first line in the page, from 1."""

    language: str
    text: str
    line: int


def pages() -> list[Path]:
    """Every README of the project, and the page for contributors."""
    # Of the project's own folders: a clone may hold environments of any name, with pages of their packages.
    rooms = [
        path
        for room in ("effseg", "kernels", "benchmarks", "tests")
        for path in (ROOT / room).rglob("README.md")
    ]
    linked = ROOT / "effseg" / "kernels"
    found = [ROOT / "README.md", *(path for path in rooms if linked not in path.parents)]
    return sorted([*found, ROOT / ".github" / "CONTRIBUTING.md"])


def blocks(page: Path) -> Iterator[Block]:
    """Fenced ones, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    begin = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if begin is None:
            begin, language = number + 1, line[3:].strip()
        else:
            yield Block(language, "\n".join(lines[begin:number]), begin + 1)
            begin = None
    assert begin is None, f"{page}: the block at line {begin} has no end"


def make_world(folder: Path) -> dict[str, Any]:
    """Writes DIR (cases with labels), SCANS (their scans), RUN (a network) and, with nnU-Net, the
    model of its page; what Python blocks may use: image (1, 1, D, H, W) in -1 ... 1 and labels
    (1, D, H, W), of one phantom, where the network would be."""
    data = phantom.write_dataset(folder / "DIR", cases=2, shape=(24, 16, 16), unseen=0)
    shutil.copytree(data / "imagesTr", folder / "SCANS")
    (folder / "RUN").mkdir()
    network = EffSegNet(1, len(phantom.NAMES), preset="tiny")
    network.save(
        folder / "RUN" / "best.safetensors", preprocessing=Preprocessing(), labels=load_label_map(data)
    )
    if importlib.util.find_spec(OPTIONAL) is not None:
        import nnunet_models
        import with_nnunet  # noqa: F401  so that nnU-Net can look trainers up

        plans = nnunet_models.make_plans(nnunet_models.configuration((16, 16, 16), (32.0, 32.0, 32.0)))
        nnunet_models.write_model(folder / NNUNET_MODEL, plans, folds=(0, 1), steps=1)
    volume, labels = map(torch.from_numpy, phantom.generate((32, 32, 32), seed=1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image = volume[None, None].float().clamp(-200, 400).sub(100).div(300)
    return {"__name__": "__main__", "image": image.to(device), "labels": labels[None].to(device)}


# Python


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> bool:
    """Whether it could be run; where not, it was checked."""
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    try:
        exec(code, namespace)
    except Exception as error:
        if importlib.util.find_spec(OPTIONAL) is not None or not wants_optional(error):
            raise
        check_imports(block)
        return False
    return True


def wants_optional(error: BaseException | None) -> bool:
    """Whether the error, or what caused it, is that the optional package is not there."""
    if error is None:
        return False
    name = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    return name.split(".")[0] == OPTIONAL or wants_optional(error.__cause__)


def check_imports(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("effseg"):
            for name in node.names:
                assert hasattr(importlib.import_module(node.module), name.name)


# Shell


def commands(block: Block) -> list[list[str]]:
    """Words of every command; comments are left out, `&&` parts commands."""
    joined = block.text.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            if word == "&&":
                found.append(words)
                words = []
            else:
                words.append(word)
        found.append(words)
    return [words for words in found if words]


def check_command(words: list[str], config: pytest.Config) -> None:
    """Run it or check it, as the module says. The working directory is that of `make_world`."""
    match words:
        case ["effseg", command, *rest]:
            check_effseg(command, rest)
        case ["torchrun", "--nproc-per-node", count, "-m", "effseg", command, *rest]:
            assert count.isdecimal()
            check_effseg(command, rest)
        case ["pip", "install", *rest]:
            check_pip(rest)
        case ["pytest", *rest]:
            config._parser.parse([*rest])  # raises UsageError
        case ["python", "-m", module, *rest]:
            check_module(module, rest)
        case ["bash", script, *rest] | [script, *rest]:
            path = ROOT / script
            assert path.is_file(), f"{script}: no such program in the repository"
            assert all(word in path.read_text(encoding="utf-8") for word in rest)


def check_effseg(command: str, rest: list[str]) -> None:
    assert command in cli.COMMANDS, f"effseg {command}: no such command"
    if command in RUN:
        assert cli.main([command, *rest]) == 0
        return
    arguments = cli._parser([command]).parse_args([command, *rest])
    if command == "nnunet" and arguments.action == "predict" and nnunet_predict.names_folder(rest[1:]):
        nnunet_predict._parser().parse_args(rest[1:])


def check_pip(rest: list[str]) -> None:
    places = [word for word in rest if not word.startswith("-")]
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for place in places:
        path, _, extra = place.rstrip("]").partition("[")
        assert (ROOT / path).exists(), place
        assert not extra or f'"{extra}": [' in setup, place


def check_module(name: str, rest: list[str]) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name}: no such module"
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    for option in rest:
        assert not option.startswith("-") or f'"{option}"' in text, f"{name}: no option {option}"


# Links


def links(page: Path) -> list[str]:
    """Those to files of the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link.partition("#")[0] for link in found if "://" not in link and not link.startswith("#")]
