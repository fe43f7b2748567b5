"""Steps on a pretended GPU: no tensor of another device, backward in another thread, settings as in forward.

Run by test_pretended_device.py in a process of its own; by hand: pytest tests/on_pretended_device.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import pretended_device
import pytest
import torch
from convertible import NETWORKS, listed
from pretended_device import DEVICE, Watch, on_device, pretended
from torch.utils.checkpoint import checkpoint

import effseg
import effseg.algorithms
from effseg import functional, inference, modules
from effseg.algorithms.aten import ops as aten_ops
from effseg.common.settings import Captured, Setting, settings
from effseg.conversion.streamed import Streaming
from effseg.data.device_augmentation import Changes, change
from effseg.expressions.slabs import Abridgement
from effseg.kernels import heuristics, launch
from effseg.losses import dice_cross_entropy
from effseg.models import effsegnet
from effseg.models.levels import Architecture
from effseg.offload.link import Immediate, link
from effseg.offload.slabs import Traffic
from effseg.parallel.partition import Split
from effseg.parallel.transport import Pretended

pytestmark = pytest.mark.skipif(
    pretended_device.missing() is not None, reason=pretended_device.missing() or ""
)
SIZE = (5, 3, 4)  # two slabs
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS = {"ignore_index": 255, "label_smoothing": 0.1, "batch_dice": True, "include_background": True}


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few levels: an operator on fake tensors takes a third of a millisecond."""
    monkeypatch.setitem(effsegnet.PRESETS, "small", Architecture((4, 4, 4), (0, 1, 1)))
    monkeypatch.setitem(effsegnet.PRESETS, "deep", Architecture((4, 4, 4, 4), (0, 1, 0, 0)))
    monkeypatch.setitem(effsegnet.PRESETS, "strided", Architecture((4, 4, 4), (0, 1, 1), stem_stride=2))


@pytest.fixture(autouse=True)
def fake() -> Any:
    with pretended():
        yield


def batch(samples: int = 1, size: tuple[int, ...] = SIZE, channels: int = 1) -> tuple[Any, Any]:
    image = torch.empty(samples, channels, *size, device=DEVICE)
    return image, torch.empty(samples, *size, dtype=torch.uint8, device=DEVICE)


def step(
    network: torch.nn.Module,
    loss: Callable[[], torch.Tensor],
    dtype: str = "bf16",
    algorithm: str = "auto",
    others: Mapping[Setting[Any], Any] | None = None,
) -> Watch:
    """Forward, with an algorithm and other settings, and backward, without."""
    low = DTYPES[dtype]
    with Watch(others) as watch:
        with ExitStack() as inside:
            inside.enter_context(effseg.algorithm(algorithm))
            inside.enter_context(torch.autocast(DEVICE, low or torch.bfloat16, enabled=low is not None))
            for setting, value in (others or {}).items():
                inside.enter_context(setting.set(value))
            value = loss()
        value.backward()
    assert value.device.type == DEVICE
    assert watch.nodes, "no backward of effseg's nodes was seen"
    assert threading.main_thread() not in watch.threads
    grads = [p.grad for p in network.parameters() if p.requires_grad]
    assert {g.device.type for g in grads if g is not None} == {DEVICE}
    return watch


# ---------------------------------------------------------------- EffSegNet
@pytest.mark.parametrize(
    ("options", "dtype", "algorithm"),
    [
        ({"memory": "raw"}, "bf16", "aten"),
        ({"memory": "raw", "norm": "group", "recompute": 2, "thick_axis": 2}, "fp16", "triton"),
        pytest.param(
            {"memory": "raw", "preset": "deep", "norm": "batch", "auxiliary": True},
            "fp32",
            "aten",
            marks=pytest.mark.slow,
        ),
        ({"memory": "stream", "norm": "batch", "recompute": 1}, "bf16", "aten"),
        ({"memory": "stream", "preset": "deep", "auxiliary": True, "thick_axis": 0}, "fp16", "triton"),
        ({"memory": "stream", "norm": "group"}, "fp32", "triton"),
        ({"memory": "raw", "preset": "strided", "auxiliary": True}, "bf16", "triton"),
        pytest.param({"memory": "auto", "memory_budget": "1GB"}, "fp32", "auto", marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_a_step_of_effsegnet(options: dict[str, Any], dtype: str, algorithm: str) -> None:
    network = on_device(effseg.EffSegNet(1, 3, **{"preset": "small", **options}))
    image, labels = batch()
    if options["memory"] == "auto":
        network._configure(functional.plain(image), image, labels)  # predicts, on fake tensors of the CPU
    step(network, lambda: network.loss(image, labels), dtype, algorithm)


class Watched(Immediate):
    """Copies between the device and the CPU, and in which threads they were asked for. None is made, which
    `Watch` would take for an operator of two devices."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.fetched: list[tuple[str, str]] = []
        self.threads: set[threading.Thread] = set()

    def send(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        self.sent.append((source.device.type, target.device.type))
        assert target.is_contiguous()

    def fetch(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        self.fetched.append((source.device.type, target.device.type))
        self.threads.add(threading.current_thread())
        assert target.is_contiguous()


@pytest.mark.parametrize(("dtype", "algorithm"), [("bf16", "aten"), ("fp16", "triton")])
def test_slabs_come_back_to_the_device(dtype: str, algorithm: str) -> None:
    network = on_device(effseg.EffSegNet(1, 3, preset="small", memory="stream", offload=True))
    image, labels = batch(size=(9, 7, 12))
    moved = Watched()
    with link.set(moved):
        step(network, lambda: network.loss(image, labels), dtype, algorithm)
    assert set(moved.sent) == {(DEVICE, "cpu")}
    assert set(moved.fetched) == {("cpu", DEVICE)}
    assert len(moved.threads) == 2, "forward's thread, and the device's of backward"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["aten", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("memory", ["raw", "stream"])
@pytest.mark.parametrize("preset", ["base", "large", "large-w32", "tiny"])
def test_every_preset(preset: str, memory: str, norm: str, dtype: str, algorithm: str) -> None:
    network = on_device(effseg.EffSegNet(1, 3, preset=preset, norm=norm, memory=memory, recompute=1))
    image, labels = batch(size=(9, 7, 12))
    step(network, lambda: network.loss(image, labels), dtype, algorithm)


@pytest.mark.parametrize(
    ("layout", "memory"), [("channels last", "raw"), ("permuted", "stream"), ("int16", "stream")]
)
def test_images_of_other_layouts(layout: str, memory: str) -> None:
    network = on_device(effseg.EffSegNet(2, 3, preset="small", memory=memory))
    image, labels = batch(2, channels=2)
    if layout == "permuted":
        image, labels = (t.transpose(-3, -1).contiguous().transpose(-3, -1) for t in (image, labels))
    elif layout == "int16":
        image = image.to(torch.int16)
    else:
        image = image.contiguous(memory_format=torch.channels_last_3d)
    weights = torch.ones(3, device=DEVICE)
    step(network, lambda: network.loss(image, labels, class_weights=weights, **LOSS), algorithm="triton")


@pytest.mark.parametrize(
    ("memory", "algorithm"), [("raw", "triton"), ("stream", "aten"), ("stream", "triton")]
)
def test_prediction(memory: str, algorithm: str) -> None:
    network = on_device(effseg.EffSegNet(1, 3, preset="small", memory=memory)).eval()
    image, _ = batch()
    with effseg.algorithm(algorithm), torch.no_grad():
        with Watch(), torch.autocast(DEVICE, torch.bfloat16):
            assert network.segment(image).device.type == DEVICE
            assert network(image).device.type == DEVICE
        # From the CPU and back.
        assert inference.segment(network, image.cpu(), bf16=True).device.type == "cpu"


def test_blocks_as_modules() -> None:
    unit = on_device(modules.ConvNormAct3d(4, 4, stride=(1, 2, 2), bias=True))
    chain = torch.nn.Sequential(unit, on_device(modules.ResidualBlock3d(4, norm="group")))
    x = torch.empty(2, 4, *SIZE, device=DEVICE, requires_grad=True)
    step(chain, lambda: chain(x).sum(), "fp32", "triton")
    assert x.grad is not None


# ---------------------------------------------------------------- converted networks and losses
def converted(name: str, memory: str, **options: Any) -> Any:
    return on_device(effseg.convert(NETWORKS[name](), memory=memory, **options))


@pytest.mark.parametrize(
    ("name", "memory", "algorithm"),
    [
        ("dynunet residual, deep", "block", "triton"),
        ("segresnet", "raw", "triton"),
        pytest.param("plain", "auto", "auto", marks=pytest.mark.slow),
        *(
            pytest.param(name, memory, algorithm, marks=pytest.mark.slow)
            for name in NETWORKS
            for memory in ("raw", "block")
            for algorithm in ("aten", "triton")
        ),
    ],
)
def test_a_step_of_a_converted_network(name: str, memory: str, algorithm: str) -> None:
    network = converted(name, memory, memory_budget="1GB" if memory == "auto" else None)
    image, labels = batch(size=(16, 16, 16) if name.startswith("basic") else (8, 8, 8))
    if memory == "auto":
        network(image)  # predicts, on fake tensors of the CPU
    criterion = on_device(effseg.SegmentationLoss(class_weights=torch.ones(3), **LOSS))
    step(network, lambda: criterion(network(image), labels), "fp32", algorithm)


def test_logits_that_are_not_lazy() -> None:
    network = converted("plain", "raw", lazy_logits=False)
    image, labels = batch(2, size=(8, 8, 8))
    weights = torch.ones(3, device=DEVICE)
    loss = lambda: dice_cross_entropy(network(image), labels, class_weights=weights, **LOSS)  # noqa: E731
    step(network, loss, "fp32", "triton")
    with torch.no_grad(), Watch():
        assert all(out.device.type == DEVICE for out in listed(network.eval()(image)))


# ---------------------------------------------------------------- augmentation
@pytest.mark.parametrize("matrix", [None, np.eye(4)])
def test_augmentation(matrix: np.ndarray | None) -> None:
    image, labels = batch(channels=2)
    changes = Changes(matrix, factor=1.1, offset=0.1, mirrored=((1, 2),))
    with Watch():
        changed = change(image[0], labels[0], changes, 0)
    assert [t.device.type for t in changed] == [DEVICE, DEVICE]
    assert [t.shape for t in changed] == [image.shape[1:], labels.shape[1:]]


# ---------------------------------------------------------------- settings
VALUES: dict[str, Callable[[], Any]] = {
    "effseg_algorithm": lambda: "triton",
    "effseg_abridgement": Abridgement,
    "effseg_answer": lambda: lambda problem: heuristics.heuristic(problem),
    "effseg_pretended_device": lambda: "cuda",
    "effseg_recording": lambda: launch._Recording("sm_90", []),
    "effseg_link": Immediate,
    "effseg_traffic": Traffic,
    "effseg_split": lambda: Split(Pretended(0, 1, SIZE[0])),
    "effseg_streaming": lambda: Streaming(frozenset()),
}
"""A value of every lasting setting that is not its default. A new setting needs one."""


def values() -> dict[Setting[Any], Any]:
    found = {s: VALUES[s.name]() for s in settings() if s.lasting}
    assert all(value is not s.default for s, value in found.items())
    return found


def network_and_loss(kind: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    if kind.startswith("converted"):
        network = converted("plain", kind.split()[1])
        image, labels = batch(size=(8, 8, 8))
        return network, lambda: dice_cross_entropy(network(image), labels)
    memory, recompute = kind.split()
    network = on_device(effseg.EffSegNet(1, 3, preset="small", memory=memory, recompute=int(recompute)))
    image, labels = batch()
    return network, lambda: network.loss(image, labels)


@pytest.mark.parametrize("kind", ["raw 1", "stream 2", "converted block"])
def test_backward_sees_every_setting_of_forward(kind: str) -> None:
    """Backward is outside of the `with` block, and in another thread."""
    expected = values()
    if kind.startswith("converted"):
        # A converted network sets the first itself; the second is of volumes of other sizes.
        expected = {s: v for s, v in expected.items() if s.name not in ("effseg_streaming", "effseg_split")}
    network, loss = network_and_loss(kind)
    assert step(network, loss, others=expected).lost == set()
    assert all(setting.get() is setting.default for setting in expected)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The algorithms that were asked for, and whether in the main thread."""
    seen: list[tuple[str, bool]] = []
    real = effseg.algorithms.load

    def load(name: str) -> Any:
        seen.append((name, threading.current_thread() is threading.main_thread()))
        return real(name)

    monkeypatch.setattr(effseg.algorithms, "load", load)
    return seen


@pytest.mark.parametrize(("kind", "algorithm"), [("raw 1", "aten"), ("converted block", "triton")])
def test_a_second_pass_takes_the_algorithm_of_the_first(
    kind: str, algorithm: str, loaded: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if algorithm == "aten":  # as on a GPU with a tuned file
        monkeypatch.setattr(effseg.algorithms, "choose", _triton_unless_forced)
    network, loss = network_and_loss(kind)
    loaded.clear()  # the report's
    step(network, loss, algorithm=algorithm)
    assert {name for name, _ in loaded} == {algorithm}
    assert {main for _, main in loaded} == {True, False}, "nothing was run again in backward"


def _triton_unless_forced(device: torch.device, dtype: torch.dtype) -> str:
    forced = effseg.algorithms._forced.get()
    return "triton" if forced == "auto" else forced


def test_lazy_logits_take_the_algorithm_of_the_network(loaded: list[tuple[str, bool]]) -> None:
    network = converted("plain", "raw")
    image, labels = batch(size=(8, 8, 8))
    loaded.clear()
    with effseg.algorithm("triton"):
        logits = network(image)
    step(network, lambda: dice_cross_entropy(logits, labels), "fp32")
    assert {name for name, _ in loaded} == {"triton"}


@pytest.mark.skipif(not hasattr(torch._C, "_remove_obj_from_tls"), reason="torch hands on no context")
def test_a_checkpoint_of_others_sees_the_settings_around_backward(loaded: list[tuple[str, bool]]) -> None:
    network, loss = network_and_loss("raw 0")
    with effseg.algorithm("triton"):
        step(network, lambda: checkpoint(loss, use_reentrant=False), algorithm="triton")
    assert {name for name, _ in loaded} == {"triton"}
    assert {main for _, main in loaded} == {True, False}


# ---------------------------------------------------------------- planted faults
def test_lost_settings_are_found(loaded: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Captured, "restored", lambda self: nullcontext())
    expected = values()
    watch = step(*network_and_loss("raw 1"), others=expected)
    assert watch.lost == {setting.name for setting in expected}
    assert {name for name, _ in loaded} == {"triton"}, "a node forgot its forward's algorithm"


@pytest.mark.parametrize("function", ["affine", "fold", "convolution_backward"])
def test_a_tensor_of_the_cpu_is_found(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(aten_ops, function)

    def planted(first: torch.Tensor | None, second: torch.Tensor, *args: Any, **options: Any) -> Any:
        return real(first, second + torch.zeros(second.shape), *args, **options)

    monkeypatch.setattr(aten_ops, function, planted)
    with pytest.raises((AssertionError, RuntimeError), match="cpu"):
        step(*network_and_loss("raw 0"), dtype="fp32", algorithm="aten")


def test_a_volume_on_the_cpu_is_found() -> None:
    with Watch(), pytest.raises(AssertionError, match="on cpu"):
        torch.empty(*SIZE)
