"""Flags and fixtures that every test shares."""

import os
import time
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--gpu", action="store_true", help="run the tests that need an NVIDIA GPU, too")
    parser.addoption("--minutes", type=float, metavar="N", help="skip what has not begun after so long")


STARTED = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU kernels run in Triton's interpreter, asked for before they are imported."""
    config.stash[STARTED] = time.monotonic()
    if not config.getoption("--gpu"):
        os.environ["TRITON_INTERPRET"] = "1"
        from interpreter import mend

        mend()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = []
    if not config.getoption("--slow"):
        skipped.append(("slow", "takes minutes: run with --slow"))
    if not config.getoption("--gpu"):
        skipped.append(("gpu", "needs an NVIDIA GPU: run with --gpu"))
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--gpu was given, but torch sees no CUDA device")
    for item in items:
        for marker, reason in skipped:
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - item.config.stash[STARTED] > 60 * minutes:
        pytest.skip(f"not begun after {minutes:g} minutes")


@pytest.fixture(scope="session")
def kernel_device(pytestconfig: pytest.Config) -> torch.device:
    """Where tests run kernels: on the GPU with --gpu, else in the interpreter."""
    return torch.device("cuda" if pytestconfig.getoption("--gpu") else "cpu")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT beside the repository; tests that use it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real CT: {folder} is not a folder")
    return folder
