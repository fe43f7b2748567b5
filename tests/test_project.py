"""What describes the project says the same everywhere: versions, Python, torch."""

import re
from pathlib import Path

import yaml

from effseg.version import __version__

ROOT = Path(__file__).parents[1]
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def loaded(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version_and_licence():
    citation = loaded("CITATION.cff")
    assert citation["version"] == __version__
    assert citation["license"] == re.search(r'license="([^"]+)"', SETUP)[1]
    assert citation["references"][0]["url"].endswith("2003.10690")


def test_pre_commit_runs_the_ruff_of_the_constraints():
    (hooks,) = [repo for repo in loaded(".pre-commit-config.yaml")["repos"] if "ruff" in repo["repo"]]
    assert f"ruff=={hooks['rev'].removeprefix('v')}\n" in CONSTRAINTS


def test_workflows_run_what_a_contributor_runs():
    jobs = loaded(".github/workflows/checks.yml")["jobs"]
    said = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for line in ("ruff check .", "ruff format --check .", "mypy"):
        assert line in said
        assert f"\n{line}\n" in script
    assert any(line.startswith("pytest") for line in said)


def test_workflows_begin_with_the_oldest_versions_and_end_with_the_newest():
    matrix = loaded(".github/workflows/checks.yml")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', SETUP)
    assert {pythons[0], pythons[-1]} == {entry["python"] for entry in matrix}
    assert {entry["torch"] for entry in matrix} == {"oldest", "constraints", "newest"}
    text = (ROOT / ".github/workflows/checks.yml").read_text(encoding="utf-8")
    for package in ("torch", "triton"):
        oldest = re.search(rf'"{package}>=([\d.]+)', SETUP)[1]
        assert f"'{package}=={oldest}.*'" in text


def test_issue_templates_can_be_read():
    paths = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(paths) == 4
    for path in paths:
        template = loaded(path)
        if path.stem != "config":
            assert {"name", "description", "body"} <= set(template)


def test_tools_take_the_lowest_python():
    lowest = re.search(r'python_requires=">=(3\.\d+)', SETUP)[1]
    tools = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\npython_version = "{lowest}"\n' in tools
    assert f'\ntarget-version = "py{lowest.replace(".", "")}"\n' in tools
