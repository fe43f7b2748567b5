"""Where kernels are started, and what is remembered of the GPU that they are chosen for."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from effseg.kernels import config, device, launch, tuned
from effseg.kernels.choose import choose
from effseg.kernels.config import Config


@pytest.fixture
def current(monkeypatch) -> list[int]:
    """The stack of current GPUs, of which this process has two; every change of it is real to torch."""
    stack = [0]

    @contextmanager
    def change(to: torch.device):
        stack.append(to.index)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: stack[-1])
    monkeypatch.setattr(torch.cuda, "device", change)
    return stack


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on the second GPU."""

    device = torch.device("cuda", 1)


class Launcher:
    """In place of a kernel: notes the GPU that is current while it is started, and its arguments."""

    def __init__(self, current: list[int]) -> None:
        self.current, self.started = current, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.started.append((self.current[-1], grid, args))


@pytest.mark.parametrize(("already", "changes"), [(0, 1), (1, 0)])
def test_kernels_run_on_the_gpu_of_their_tensors(current, already, changes, monkeypatch):
    current[:] = [already]
    changed = []
    enter = torch.cuda.device
    monkeypatch.setattr(torch.cuda, "device", lambda to: changed.append(to) or enter(to))
    tensor, launcher = torch.zeros(2).as_subclass(Elsewhere), Launcher(current)
    launch.launch(launcher, (3,), None, tensor, 7, num_warps=4)
    assert launcher.started == [(1, (3,), (None, tensor, 7))]
    assert len(changed) == changes
    assert current == [already]


def test_kernels_on_the_cpu_change_no_gpu(current, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked for"))
    launcher = Launcher(current)
    launch.launch(launcher, (3,), torch.zeros(2))
    assert [gpu for gpu, *_ in launcher.started] == [0]


@pytest.fixture
def gpus(monkeypatch) -> list[torch.device]:
    """Two different GPUs; and which of them torch was asked about."""
    asked = []
    names, counts = ("NVIDIA H200", "NVIDIA A100-SXM4-40GB"), (132, 108)

    def properties(of):
        asked.append(of)
        return SimpleNamespace(multi_processor_count=counts[of.index])

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda of: names[of.index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: ((9, 0), (8, 0))[of.index])
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return asked


def problem_on(index: int) -> config.Problem:
    like = SimpleNamespace(shape=(1, 16, 8, 64, 64), device=torch.device("cuda", index), dtype=torch.bfloat16)
    return launch.problem("norm_act_backward", like)


def test_configurations_are_those_of_the_gpu_of_a_tensor(gpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    first, second = problem_on(0), problem_on(1)
    assert (first.architecture, first.gpu, first.multiprocessors) == ("sm_90", "nvidia-h200", 132)
    assert (second.architecture, second.gpu, second.multiprocessors) == (
        "sm_80", "nvidia-a100-sxm4-40gb", 108,
    )  # fmt: skip
    assert (choose(first).splits, choose(second).splits) == (4 * 132, 4 * 108)
    fastest = Config("tile", block_w=32, block_n=16, splits=7)
    path = tuned.cache_folder() / "nvidia-a100-sxm4-40gb.json"
    path.parent.mkdir(parents=True)
    path.write_text(tuned.tuned_document({tuned.key(second): fastest}))
    tuned.read_tuned.cache_clear()
    assert choose(second) == fastest
    assert choose(first).splits == 4 * 132
    tuned.read_tuned.cache_clear()


def test_torch_is_asked_once_about_a_gpu_but_always_about_the_current_one(gpus, monkeypatch):
    for _ in range(3):
        problem_on(1)
        problem_on(0)
    assert [of.index for of in gpus] == [1, 0]
    answers = iter(["NVIDIA H100", "NVIDIA A30"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda of: next(answers))
    assert [device.gpu(torch.device("cuda")) for _ in range(2)] == ["nvidia-h100", "nvidia-a30"]


def test_samples_that_are_no_whole_number_of_voxels_apart_are_copied():
    """Kernels count the strides of samples in voxels."""
    shape, strides = (2, 3, 2, 4, 5), (3 * 40, 1, 60, 15, 3)
    memory = torch.arange(2 * 3 * 41, dtype=torch.float32)
    whole, odd = (memory.as_strided(shape, (first, *strides[1:])) for first in (120, 121))
    assert launch.channels_last(whole) is whole
    copy = launch.channels_last(odd)
    assert copy.data_ptr() != odd.data_ptr()
    assert torch.equal(copy, odd)
    assert launch.sample_stride(whole) == launch.sample_stride(copy) == 40
    assert launch.sample_stride(whole[:1]) == launch.sample_stride(None) == 0


def test_planes_that_32_bits_cannot_index_are_refused():
    plane = torch.empty(1).expand(1, 64, 1, 2**13, 2**12)
    with pytest.raises(ValueError, match=r"planes of fewer than 2\^31 elements, got 64 x 8192 x 4096"):
        launch.channels_last(plane)
