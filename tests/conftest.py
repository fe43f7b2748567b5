"""Flags and fixtures that every test shares."""

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--gpu", action="store_true", help="run the tests that need an NVIDIA GPU, too")
    parser.addoption("--minutes", type=float, metavar="N", help="skip what has not begun after so long")
    parser.addoption("--seed", type=int, default=0, metavar="N", help="other random numbers: N to every seed")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite, or folders of it, in as many processes as there are cores (a gigabyte each, so at most
    8), of one thread each; single files and tests in this one, where starting others would take longer."""
    single = any("::" in name or Path(name).is_file() for name in config.args)
    if single or config.getoption("--gpu") or config.getoption("usepdb"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes' own, and of what they start
    return min(cores, 8) if cores > 1 else 0


STARTED = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU kernels run in Triton's interpreter, asked for before they are imported."""
    config.stash[STARTED] = time.monotonic()
    if seed := config.getoption("--seed"):
        move_seeds(seed)
    if not config.getoption("--gpu"):
        os.environ["TRITON_INTERPRET"] = "1"
        from interpreter import mend

        mend()


def move_seeds(by: int) -> None:
    """Adds to every seed that a test gives torch, so that its numbers are others."""
    manual_seed = torch.manual_seed

    class Generator(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + 1000 * by)

    torch.Generator = Generator  # type: ignore[misc]
    torch.manual_seed = lambda seed: manual_seed(seed + 1000 * by)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Markers, not keywords: names of folders are these, too, and a clone may lie in one that is called gpu.
    # Long tests first, else the last of them has one core only.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    leave_diagonals(items)
    skipped = []
    if not config.getoption("--slow"):
        skipped.append(("slow", "takes minutes: run with --slow"))
    if not config.getoption("--gpu"):
        skipped.append(("gpu", "needs an NVIDIA GPU: run with --gpu"))
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--gpu was given, but torch sees no CUDA device")
    for item in items:
        for marker, reason in skipped:
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def leave_diagonals(items: list[pytest.Item]) -> None:
    """Of tests that are marked so, whose parameters make a product, what is off its diagonal is slow: every
    value of each parameter is met, not each with all others."""
    for item in items:
        if item.get_closest_marker("diagonal") is not None:
            axes = [mark.args for mark in item.iter_markers("parametrize")]
            place = [_index(item, *axis) for axis in axes]
            steps = range(max(len(values) for _, values in axes))
            if not any(place == [step % len(values) for _, values in axes] for step in steps):
                item.add_marker(pytest.mark.slow)


def _index(item: pytest.Item, names: str | tuple[str, ...], values: list[Any]) -> int:
    """Which values of a parametrization a test has."""
    single = isinstance(names, str)
    own = [item.callspec.params[name] for name in ([names] if single else names)]  # type: ignore[attr-defined]
    for index, given in enumerate(values):
        given = given.values if hasattr(given, "marks") else [given] if single else given
        if all(a is b for a, b in zip(own, given, strict=True)):
            return index
    raise AssertionError(f"{item.nodeid}: none of its own values")


def pytest_collection_finish() -> None:
    """What has been imported stays: collections, with which predictions of memory begin, pass over it."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - item.config.stash[STARTED] > 60 * minutes:
        pytest.skip(f"not begun after {minutes:g} minutes")


@pytest.fixture(scope="session")
def kernel_device(pytestconfig: pytest.Config) -> torch.device:
    """Where tests run kernels: on the GPU with --gpu, else in the interpreter."""
    return torch.device("cuda" if pytestconfig.getoption("--gpu") else "cpu")


@pytest.fixture
def small_preset(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a preset with all that presets are made of, in few channels and levels: predictions on fake
    tensors and steps in the interpreter cost by the layer."""
    from effseg.models.levels import PRESETS, Architecture

    monkeypatch.setitem(PRESETS, "small", Architecture((16, 16, 24), (0, 1, 1)))
    return "small"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT beside the repository; tests that use it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real CT: {folder} is not a folder")
    return folder
