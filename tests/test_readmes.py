"""The pages of the project: every code block runs, every link leads somewhere. How: readmes.py."""

import re
import shutil
from pathlib import Path

import pytest
from readmes import (
    LANGUAGES,
    ROOT,
    Block,
    blocks,
    check_command,
    commands,
    links,
    make_world,
    pages,
    run_python,
)

from effseg import cli

PAGES = pages()
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
MOST_LINES = 120


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, make_world(folder)


def test_the_first_readme_is_short_and_says_first_what_was_not_measured():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    assert any("Not measured: anything on a GPU" in line for line in lines[:20])
    block = next(b for b in blocks(ROOT / "README.md") if b.text.startswith("effseg "))
    assert len(commands(block)) == 6


def test_there_is_a_page_for_every_subject():
    subjects = (
        "expressions",
        "operators",
        "conversion",
        "nnunet",
        "planning",
        "training",
        "models",
        "parallel",
    )
    expected = {f"effseg/{name}/README.md" for name in subjects}
    assert expected | {"README.md", "kernels/README.md", "benchmarks/README.md"} <= set(NAMES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:monai")
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_code_block_runs(page, world, tmp_path, monkeypatch, request, capsys):
    given, namespace = world
    folder = shutil.copytree(given, tmp_path / "here")
    monkeypatch.chdir(folder)
    names = dict(namespace)
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: a block of {block.language!r}"
        if block.language == "python":
            run_python(block, page, names)
        elif block.language == "bash":
            for words in commands(block):
                check_command(words, request.config)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page):
    missing = [link for link in links(page) if not (page.parent / link).exists()]
    assert missing == []


def test_modules_and_commands_named_in_the_text_exist():
    """In `code` outside of blocks."""
    missing = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for code in re.findall(r"`([^`\n]+)`", text):
            if module := re.fullmatch(r"python -m (effseg[\w.]*|benchmarks[\w.]*)( .*)?", code):
                path = ROOT / (module[1].replace(".", "/") + ".py")
                if not path.exists() and not (path.with_suffix("") / "__main__.py").exists():
                    missing.append(f"{page.name}: {code}")
            elif (command := re.match(r"effseg (\w+)", code)) and command[1] not in (
                *cli.COMMANDS,
                "COMMAND",
            ):
                missing.append(f"{page.name}: {code}")
    assert missing == []


PLACE = re.compile(r"(?:effseg|kernels|benchmarks|tests|\.ci|\.github)/[\w./-]+")
STAND_INS = {
    "effseg/operators/NAME.py",
    "NAME_sweeps.py",
    "effseg/models/NAME.py",
    "effseg/conversion/rules/TOPIC.py",
}
"""Names in the recipes for contributors that stand for others."""


def test_files_named_in_the_text_exist():
    missing = set()
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for code in re.findall(r"`([^`\n]+)`", text):
            place = PLACE.fullmatch(code)
            if place and not (ROOT / place[0]).exists():
                missing.add(place[0])
    assert missing <= STAND_INS


# The checks themselves


def bash(text):
    return Block("bash", text, 1)


def test_commands_are_told_apart():
    text = "a b  # comment\n# alone\n\nc 'd e' && f \\\n  g"
    assert commands(bash(text)) == [["a", "b"], ["c", "d e"], ["f", "g"]]


@pytest.mark.parametrize(
    "line",
    [
        "effseg trian --data DIR --output RUN",
        "effseg train --dta DIR --output RUN",
        "effseg nnunet predict -m FOLDER -i SCANS",
        "effseg predict --checkpoint ABSENT --input SCANS --output OUT",
        "torchrun --nproc-per-node N -m effseg train --data DIR --output RUN",
        "pip install '.[nonsense]'",
        "pip install ./absent",
        "pytest --nonsense",
        "python -m effseg.absent",
        "python -m benchmarks.guard --nonsense",
        "benchmarks/absent.sh all",
        "benchmarks/gpu.sh nonsense",
    ],
)
def test_a_command_that_does_not_work_is_found(line, request, world, monkeypatch):
    monkeypatch.chdir(world[0])
    (words,) = commands(bash(line))
    with pytest.raises((AssertionError, SystemExit, ValueError, pytest.UsageError)):
        check_command(words, request.config)


def test_a_python_block_that_fails_is_found():
    with pytest.raises(NameError):
        run_python(Block("python", "absent", 3), Path("page.md"), {})
    with pytest.raises(ModuleNotFoundError):
        run_python(Block("python", "import absent_module", 3), Path("page.md"), {})
