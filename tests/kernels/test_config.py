"""Configurations: tuned files, their faults, and heuristics that every problem can be launched with."""

import dataclasses
import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from effseg.kernels import config, heuristics, tuned
from effseg.kernels.choose import choose, uses_aten
from effseg.kernels.config import ATEN, INTERPRETER, LOOPS, Config, Problem

CONVOLUTIONS = ("conv3d_fwd", "conv3d_dgrad", "conv3d_wgrad")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", INTERPRETER)
WIDTHS = (1, 3, 16, 17, 32, 48, 64, 96, 128, 256, 320, 640)
KERNELS = ((3, 3, 3), (1, 1, 1), (1, 3, 3), (3, 1, 3))
STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 1))
PROBLEM = Problem("conv3d_fwd", "sm_90", "bf16", 32, 32, (128, 128, 128), (3, 3, 3), gpu="some-gpu")
TUNED = Config("tap", block_d=2, block_h=8, block_w=16, block_n=32, block_k=32, num_stages=3)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A user's cache and a folder of shipped files, both empty; nothing remembered of files read before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.read_tuned.cache_clear()
    yield
    tuned.read_tuned.cache_clear()


def write(folder: Path, entries: dict[str, Config], gpu: str = "some-gpu") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{gpu}.json"
    path.write_text(tuned.tuned_document(entries))
    return path


# Heuristics


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_every_convolution_has_a_valid_configuration(op, architecture):
    options = itertools.product(config.DTYPES, WIDTHS, WIDTHS, KERNELS, STRIDES, (False, True))
    for dtype, ci, co, kernel, stride, prologue in options:
        problem = Problem(op, architecture, dtype, ci, co, (32, 64, 64), kernel, stride, prologue)
        chosen = choose(problem)
        assert_valid(problem, chosen)


def assert_valid(problem: Problem, chosen: Config) -> None:
    if uses_aten(chosen):
        assert problem.op == "conv3d_wgrad", problem
        return
    depth, _ = heuristics.contraction(problem)
    cube = problem.kernel == (3, 3, 3) and problem.stride == (1, 1, 1)
    channels = (problem.in_channels, problem.out_channels)
    assert chosen.loop in LOOPS[problem.op], problem
    assert chosen.num_warps in (1, 2, 4, 8), problem
    assert 1 <= chosen.num_stages <= 4, problem
    if chosen.loop == "slide":
        assert cube, problem
        assert depth <= 64, problem
    if chosen.loop in ("pair", "pair3"):
        assert cube, problem
        assert set(channels) <= {16, 32}, problem
    if chosen.loop == "kw":
        assert cube, problem
        assert max(channels) <= 64, problem
    assert is_power_of_two(chosen.block_h), problem
    assert is_power_of_two(chosen.block_w), problem
    # Products are at least 16 in every direction; the voxels are a direction everywhere.
    assert chosen.block_h * chosen.block_w >= 16, problem
    if problem.op != "conv3d_wgrad" or chosen.loop == "tap":
        assert is_power_of_two(chosen.block_n), problem
        assert chosen.block_n >= 16, problem
    if chosen.loop in ("tap", "few"):
        assert is_power_of_two(chosen.block_k), problem
        assert chosen.block_k >= 16, problem
    if problem.op == "conv3d_wgrad":
        assert chosen.splits >= 1, problem
    else:
        assert chosen.block_d >= 1, problem


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", [op for op in LOOPS if op not in CONVOLUTIONS])
def test_every_other_operator_has_a_valid_configuration(op, architecture):
    for dtype, channels in itertools.product(config.DTYPES, WIDTHS):
        chosen = choose(Problem(op, architecture, dtype, channels, channels, (32, 64, 64)))
        assert chosen.loop in LOOPS[op]
        assert is_power_of_two(chosen.block_w)
        if not op.startswith("head"):
            assert is_power_of_two(chosen.block_n)
            assert chosen.block_n <= 4096
        if op.startswith("upsample"):
            assert is_power_of_two(chosen.block_h)
            assert chosen.block_d >= 1
        else:
            assert chosen.splits >= 1


@pytest.mark.parametrize("op", LOOPS)
def test_the_interpreter_gets_small_tiles(op):
    for channels, kernel in itertools.product(WIDTHS, KERNELS):
        chosen = choose(Problem(op, INTERPRETER, "fp32", channels, channels, (9, 9, 9), kernel))
        assert max(chosen.block_h, 1) * chosen.block_w <= 64
        assert chosen.block_n <= 32
        assert chosen.block_d <= 3
        assert chosen.splits <= 4


def test_the_interpreter_runs_the_loops_that_gpus_run():
    for op, channels in itertools.product(CONVOLUTIONS, WIDTHS):
        problems = [
            Problem(op, a, "bf16", channels, channels, (9, 9, 9), (3, 3, 3)) for a in ("sm_90", INTERPRETER)
        ]
        assert len({choose(problem).loop for problem in problems}) == 1


@pytest.mark.parametrize(
    ("architecture", "known"),
    [
        ("sm_70", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_99", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_200", "sm_100"),
    ],
)
def test_unknown_architectures_are_taken_for_the_nearest_lower_known_one(architecture, known):
    assert heuristics.nearest_known(architecture) == known
    other, own = (dataclasses.replace(PROBLEM, architecture=a) for a in (known, architecture))
    assert choose(other) == choose(own)


@pytest.mark.parametrize(
    ("triton", "columns"), [({"triton": "3.7.1"}, 32), ({"triton": "3.10.0+git1"}, 64), ({}, 64)]
)
def test_accumulators_fit_the_tensor_memory_that_a_compiler_uses(triton, columns, monkeypatch):
    monkeypatch.setattr(heuristics, "compilers", lambda: triton)
    problem = dataclasses.replace(PROBLEM, architecture="sm_100", out_channels=64)
    assert choose(problem).block_n == columns
    assert choose(dataclasses.replace(problem, architecture="sm_90")).block_n == 64


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_float32_tiles_are_no_larger_than_bfloat16s(op):
    for channels in WIDTHS:
        problem = Problem(op, "sm_90", "bf16", channels, channels, (32, 64, 64), (3, 3, 3), prologue=True)
        low, high = choose(problem), choose(dataclasses.replace(problem, dtype="fp32"))
        if high.loop == low.loop:
            assert high.block_h * high.block_w * high.block_n <= low.block_h * low.block_w * low.block_n


@pytest.mark.parametrize(
    ("change", "named"), [({"op": "conv4d"}, "op: .*'conv4d'"), ({"dtype": "fp64"}, "dtype: .*'fp64'")]
)
def test_unknown_problems_are_errors_that_name_them(change, named):
    with pytest.raises(ValueError, match=named):
        choose(dataclasses.replace(PROBLEM, **change))


# Tuned files


def test_the_users_file_comes_before_the_shipped_one_and_that_before_heuristics():
    heuristic = choose(PROBLEM)
    assert heuristic != TUNED
    name = tuned.key(PROBLEM)
    shipped = dataclasses.replace(TUNED, num_stages=2)
    write(tuned.SHIPPED, {name: shipped})
    tuned.read_tuned.cache_clear()
    assert choose(PROBLEM) == shipped
    write(tuned.cache_folder(), {name: TUNED})
    tuned.read_tuned.cache_clear()
    assert choose(PROBLEM) == TUNED
    assert choose(dataclasses.replace(PROBLEM, gpu="another-gpu")) == heuristic
    assert choose(dataclasses.replace(PROBLEM, gpu="")) == heuristic


def test_the_cache_is_at_home_without_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert tuned.cache_folder() == tmp_path / ".cache" / "effseg" / "tuned"


@pytest.mark.parametrize(
    "change",
    [
        {"op": "conv3d_dgrad"},
        {"dtype": "fp16"},
        {"in_channels": 64},
        {"out_channels": 64},
        {"kernel": (1, 3, 3)},
        {"stride": (2, 2, 2)},
        {"prologue": True},
        {"size": (128, 128, 129)},
    ],
)
def test_entries_are_for_what_they_were_measured_on(change):
    write(tuned.cache_folder(), {tuned.key(PROBLEM): TUNED})
    other = dataclasses.replace(PROBLEM, **change)
    assert choose(PROBLEM) == TUNED
    assert choose(other) == heuristics.heuristic(other)


def test_sizes_share_an_entry_up_to_the_next_power_of_two():
    write(tuned.cache_folder(), {tuned.key(PROBLEM): TUNED})
    for size in [(64, 128, 129), (128, 128, 127), (8, 512, 512)]:
        assert choose(dataclasses.replace(PROBLEM, size=size)) == TUNED
    assert choose(dataclasses.replace(PROBLEM, size=(64, 128, 128))) != TUNED


def test_an_entry_may_leave_a_problem_to_aten():
    write(tuned.cache_folder(), {tuned.key(PROBLEM): Config(ATEN)})
    assert uses_aten(choose(PROBLEM))


def test_documents_are_read_back():
    entries = {
        tuned.key(PROBLEM): TUNED,
        tuned.key(dataclasses.replace(PROBLEM, dtype="fp16")): Config(ATEN),
    }
    assert tuned.parse_tuned(tuned.tuned_document(entries)) == entries


BAD = {
    "corrupt": "{",
    "not a document": "[]",
    "no schema": json.dumps({"entries": {}}),
    "stale": json.dumps({"schema": 0, "entries": {}}),
    "no entries": json.dumps({"schema": tuned.SCHEMA}),
    "entries are a list": json.dumps({"schema": tuned.SCHEMA, "entries": []}),
    "an entry without a loop": json.dumps({"schema": tuned.SCHEMA, "entries": {tuned.key(PROBLEM): {}}}),
    "an unknown field": json.dumps(
        {"schema": tuned.SCHEMA, "entries": {tuned.key(PROBLEM): {"loop": "tap", "x": 1}}}
    ),
    "an unknown loop": json.dumps(
        {"schema": tuned.SCHEMA, "entries": {tuned.key(PROBLEM): {"loop": "pair"}}}
    ),
    "a text for a number": json.dumps(
        {"schema": tuned.SCHEMA, "entries": {tuned.key(PROBLEM): {"loop": "tap", "block_h": "8"}}}
    ),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_bad_files_are_ignored_with_one_warning(text):
    path = write(tuned.cache_folder(), {})
    path.write_text(text)
    with pytest.warns(UserWarning, match="some-gpu.json is ignored") as caught:
        assert choose(PROBLEM) == heuristics.heuristic(PROBLEM)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(PROBLEM) == heuristics.heuristic(PROBLEM)


def test_a_bad_users_file_leaves_the_shipped_one():
    write(tuned.SHIPPED, {tuned.key(PROBLEM): TUNED})
    write(tuned.cache_folder(), {}).write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="is ignored"):
        assert choose(PROBLEM) == TUNED


def test_a_file_that_cannot_be_read_is_ignored():
    (tuned.cache_folder() / "some-gpu.json").mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored"):
        assert choose(PROBLEM) == heuristics.heuristic(PROBLEM)


def test_shipped_files_are_valid():
    for path in (Path(config.__file__).parent / "tuned").glob("*.json"):
        assert tuned.parse_tuned(path.read_text())


def test_gpu_names_become_file_names():
    assert tuned.gpu_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert tuned.gpu_slug("NVIDIA GeForce RTX 4090 / D") == "nvidia-geforce-rtx-4090-d"


def test_it_is_pure_python():
    """Looking a configuration up must not need Triton, nor torch of its own."""
    code = (
        "import sys, types\n"
        "for name in ('effseg', 'effseg.kernels'):\n"
        "    package = sys.modules[name] = types.ModuleType(name)\n"
        f"    package.__path__ = [{str(Path(config.__file__).parent)!r}]\n"
        "import effseg.kernels.heuristics, effseg.kernels.tuned\n"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
