"""Memory of the host: taken again, pinned for a GPU."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from effseg.errors import InputError
from effseg.offload.link import CudaLink, Immediate, link_of
from effseg.offload.memory import HostMemory

CPU = torch.device("cpu")
SHAPE = (2, 3, 4, 5, 6)


def test_memory_is_taken_again_when_nothing_lies_in_it() -> None:
    host = HostMemory()
    first, second = (host.take(SHAPE, torch.float32, CPU) for _ in range(2))
    assert first.shape == SHAPE
    assert first.is_contiguous(memory_format=torch.channels_last_3d)
    assert host.nbytes == 2 * first.nbytes
    address, kept = first.data_ptr(), first.detach()[:1]
    del first
    assert host.take(SHAPE, torch.float32, CPU).data_ptr() not in (address, second.data_ptr())
    del kept
    smaller = host.take((1, *SHAPE[1:]), torch.float32, CPU)
    larger = host.take((3, *SHAPE[1:]), torch.float32, CPU)
    assert smaller.data_ptr() != larger.data_ptr()
    assert host.nbytes == 2 * second.nbytes + larger.nbytes, "a free buffer makes room for a larger one"


def test_a_copy_has_no_memory() -> None:
    host = HostMemory()
    host.take(SHAPE, torch.float32, CPU)
    assert (copy.deepcopy(host).nbytes, pickle.loads(pickle.dumps(host)).nbytes) == (0, 0)


class Runtime:
    """CUDA's, as far as it pins memory."""

    cudaError = SimpleNamespace(success=0)

    def __init__(self, code: int = 0) -> None:
        self.code, self.pinned = code, dict[int, int]()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if not self.code:
            self.pinned[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return found


def test_memory_for_a_gpu_is_pinned_until_it_is_given_back(runtime: Runtime) -> None:
    host = HostMemory()
    held = host.take(SHAPE, torch.bfloat16, torch.device("cuda", 0))
    held.fill_(1)
    assert runtime.pinned == {held.data_ptr(): held.nbytes}
    assert held.data_ptr() % 4096 == 0, "no page with memory of others"
    del host
    assert runtime.pinned
    del held
    assert not runtime.pinned


def test_memory_that_cannot_be_pinned(runtime: Runtime) -> None:
    runtime.code = 2
    with pytest.raises(InputError, match=r"offload: expected 1440 bytes .* can pin, got CUDA error 2"):
        HostMemory().take(SHAPE, torch.bfloat16, torch.device("cuda", 0))


def test_memory_that_the_host_does_not_have(runtime: Runtime) -> None:
    with pytest.raises(InputError, match=r"offload: expected \d+ bytes of memory on the host"):
        HostMemory().take((1, 2**20, 2**12, 2**12, 2**12), torch.bfloat16, torch.device("cuda", 0))


def test_links() -> None:
    assert isinstance(link_of(CPU), Immediate)
    with pytest.raises(InputError, match="offload: expected a network on cuda or cpu, got one on meta"):
        link_of(torch.device("meta"))


# ---------------------------------------------------------------- CUDA's streams, as they are asked
class Recorder:
    """Streams and events of CUDA that write down what they are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.compute = self.stream("compute")
        made = iter(("out", "back"))
        self.inside: list[str] = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream(next(made)))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.compute)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.within(stream.name))

    def stream(self, name: str) -> Any:
        def event() -> str:
            self.log.append((name, "record"))
            return f"event {len(self.log)}"

        return SimpleNamespace(
            name=name, record_event=event, wait_event=lambda e: self.log.append((name, "wait", e))
        )

    def within(self, name: str) -> Any:
        recorder = self

        class Within:
            def __enter__(self) -> None:
                recorder.inside.append(name)

            def __exit__(self, *_: object) -> None:
                recorder.inside.pop()

        return Within()


class Copied:
    """A tensor that writes down in which stream it is written."""

    def __init__(self, recorder: Recorder, value: torch.Tensor) -> None:
        self.recorder, self.value = recorder, value

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:
        self.recorder.log.append((self.recorder.inside[-1], "copy", non_blocking))
        self.value.copy_(source)


@pytest.mark.parametrize(("method", "stream"), [("send", "out"), ("fetch", "back")])
def test_a_copy_waits_for_the_device_and_the_device_for_it(
    method: str, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    link: Any = CudaLink(torch.device("cuda", 0))
    target = Copied(recorder, torch.zeros(3))
    link.wait(getattr(link, method)(target, torch.ones(3), link.mark()))
    assert recorder.log == [
        ("compute", "record"),
        (stream, "wait", "event 1"),
        (stream, "copy", True),
        (stream, "record"),
        ("compute", "wait", "event 4"),
    ]
    assert target.value.sum() == 3
