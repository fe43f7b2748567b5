"""Text is UTF-8 in every file, and no locale makes a command fail."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

from effseg import phantom

ROOT = Path(__file__).parents[1]
OPENERS = ("open", "read_text", "write_text")


def says_no_encoding(call: ast.Call) -> bool:
    """Whether the call opens a text file in the locale's encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in OPENERS or any(keyword.arg in ("encoding", None) for keyword in call.keywords):
        return False
    if name != "open":
        return not any(
            isinstance(argument, ast.Constant) and argument.value == "utf-8" for argument in call.args
        )
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    binary = any(isinstance(value, ast.Constant) and "b" in str(value.value) for value in values)
    return not binary and not (isinstance(owner, ast.Name) and owner.id == "os")


def test_every_text_file_has_its_encoding_said() -> None:
    files = [path for folder in ("effseg", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and says_no_encoding(node)
    ]
    assert found == []


PROGRAM = """
import sys
from pathlib import Path
from effseg.cli import main
data, out = map(Path, sys.argv[1:3])
def call(*words):
    code = main(list(map(str, words)))
    if code:
        sys.exit(code)
call("train", "--data", data, "--output", out / "run", "--steps", 1, "--model", "effseg-tiny", "--workers", 0,
     "--labels", sys.argv[3], "--mirror", "left-right", "--mirror-pairs", sys.argv[3].replace(",", ":"))
call("predict", "--checkpoint", out / "run", "--input", data / "imagesTs", "--output", out / "found")
call("evaluate", "--predictions", out / "found", "--labels", data / "labelsTs", "--output", out / "s.json",
     "--label-selection", sys.argv[3])
"""


def test_names_that_the_locale_cannot_write(tmp_path: Path) -> None:
    data = phantom.write_dataset(tmp_path / "data", cases=5, shape=(16, 12, 12))
    path = data / "dataset.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    names = {"liver": "Leber (größer)", "spleen": "脾臓"}
    entries["labels"] = {names.get(name, name): value for name, value in entries["labels"].items()}
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8-sig")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(data), str(tmp_path), ",".join(names.values())],
        env=os.environ | ascii_only,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert b"Glyph" not in done.stderr
    printed = done.stdout.decode("ascii")
    assert printed.count("Leber (gr\\xf6\\xdfer)") >= 2
    assert "against" in printed
    columns = (tmp_path / "run" / "progress.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "dice_Leber (größer)" in columns
    assert "dice_脾臓" in columns
    assert "Leber (größer)" in json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["names"].values()
