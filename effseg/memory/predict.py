"""Peak memory of a training step at any volume size, without the memory and without a GPU."""

import contextlib
import copy
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward

from effseg.common.device import DEVICE_KINDS, pretending
from effseg.common.formats import dtype_name
from effseg.common.tensors import unregistered
from effseg.errors import InputError
from effseg.expressions.slabs import abridged
from effseg.memory.autocast import CudaAutocast
from effseg.memory.fakes import QuickFakes, on_fakes
from effseg.memory.report import KINDS, LiveTensor, MemoryReport
from effseg.memory.step import DTYPES, Loss, follows_autocast, label_dtype_for, make_optimizer, training_loss
from effseg.memory.trace import Reserved
from effseg.memory.tracker import LiveStorages
from effseg.offload.slabs import Traffic, counted
from effseg.parallel.partition import entered, own_shape, pretended
from effseg.parallel.transport import Pretended


def peak_training_memory(
    model: nn.Module | Callable[[], nn.Module],
    shape: Sequence[int],
    *,
    dtype: str = "bf16",
    loss: Loss | None = None,
    loss_options: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    image_dtype: torch.dtype = torch.float32,
    label_dtype: torch.dtype | None = None,
    device: str = "cpu",
    augmented: bool = False,
    processes: int = 1,
) -> MemoryReport:
    """Predict the peak of one training step: forward, loss, backward, optimizer step.

    model: a network, which is left untouched, or a function of no arguments that makes one (its weights
        then take no memory either); any nn.Module that returns logits (N, K, D, H, W) or a list of them.
    shape: the image's, (N, C, D, H, W).
    dtype: ``bf16`` is a step under torch.autocast on a GPU with weights as they are, ``fp32`` one without.
    loss: called with (logits, labels, **loss_options). None: the model's own `loss` if it has one, else
        :func:`effseg.losses.dice_cross_entropy`.
    optimizer: ``adamw`` or ``sgd``; its state exists already, as in every step but the first.
    label_dtype: None: uint8 for networks of this package, int64 for those in stock torch.
    device: ``cpu`` or ``cuda``: where this package's networks would run, which work on thicker slabs and on
        more voxels at a time on a GPU. No GPU is needed.
    processes: that share the volume (`effseg.parallel`); the prediction is one's, for its rows.
    augmented: whether the batch is augmented on the device first, as `effseg train` does on a GPU.

    The step runs on fake tensors (shapes and dtypes, no numbers) through the real autograd engine, while
    every storage's birth and death is followed: exact for the bytes of tensors. Of a sweep's equal slabs a
    few stand for all. What an operator allocates inside it cannot see. For ``cuda`` a replay of PyTorch's
    caching allocator over two such steps tells what is reserved, with a workspace for every convolution that
    is as large as what it reads and writes, 256 MiB at most. Raises InputError for unknown options.
    """
    check_step(shape, dtype, device)

    def predict(fakes: FakeTensorMode) -> MemoryReport:
        return _predicted(fakes, model, shape, dtype, loss, loss_options or {}, optimizer, image_dtype,
                          label_dtype, device, augmented, processes)  # fmt: skip

    return on_fakes(predict)


def _predicted(
    fakes: FakeTensorMode,
    model: nn.Module | Callable[[], nn.Module],
    shape: Sequence[int],
    dtype: str,
    loss: Loss | None,
    loss_options: dict[str, Any],
    optimizer: str,
    image_dtype: torch.dtype,
    label_dtype: torch.dtype | None,
    device: str,
    augmented: bool,
    processes: int,
) -> MemoryReport:
    split = pretended(shape[2], processes)
    gc.collect()  # cycles of earlier steps would be freed in the middle of this one
    quick = fakes if isinstance(fakes, QuickFakes) else None
    with fakes, quiet_fakes(), abridged() as abridgement, pretending(device), entered(split):
        network = fake_copy(model)
        tracker = LiveStorages(abridgement, workspaces=device == "cuda", fakes=quick)
        steps = make_optimizer(optimizer, network.parameters())
        _make_state(steps, network)
        tracker.add([*network.parameters(), *network.buffers()], "parameters")
        tracker.add(_state_tensors(steps), "optimizer")
        n, channels, *size = own_shape(shape)
        image = torch.empty((n, channels, *size), dtype=image_dtype)
        labels = torch.empty((n, *size), dtype=label_dtype_for(network, label_dtype))
        tracker.add([image, labels], "batch")
        if augmented:
            from effseg.memory.augmentation import augment_batch  # and what it needs, which takes a second

            augment_batch(tracker, image, labels)
        with counted() as traffic:
            _step(network, steps, tracker, image, labels, dtype, loss, loss_options)
    report = _report(network, tracker, tuple(shape), dtype, device, traffic)
    if split is None:
        return report
    assert isinstance(split.transport, Pretended)
    return replace(report, processes=processes, sent=split.transport.sent, messages=split.transport.messages)


def check_step(shape: Sequence[int], dtype: str, device: str) -> None:
    """Raises InputError for a shape, a type or a device that no step has."""
    if len(shape) != 5 or min(shape) < 1:
        raise InputError(f"shape: expected (N, C, D, H, W), each 1 or more, got {tuple(shape)}")
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if device not in DEVICE_KINDS:
        raise InputError(f"device: expected one of {', '.join(DEVICE_KINDS)}, got {device!r}")


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    tracker: LiveStorages,
    image: torch.Tensor,
    labels: torch.Tensor,
    dtype: str,
    loss: Loss | None,
    options: dict[str, Any],
) -> None:
    low, follows = dtype == "bf16", follows_autocast(network)
    rules = CudaAutocast(DTYPES[dtype], switched=follows) if low else None
    own = torch.autocast("cpu", DTYPES[dtype], enabled=low and follows)
    with tracker, rules or contextlib.nullcontext():
        tracker.start_phase("forward")
        with own:
            value = training_loss(network, image, labels, loss, options)
        if rules:
            rules.forget()
        tracker.start_phase("backward")
        # Not value.backward(): that is a torch function, inside which the rules would not reach a
        # checkpoint's recomputation.
        seed = (torch.ones_like(value),)
        _engine_run_backward((value,), seed, False, False, (), allow_unreachable=True, accumulate_grad=True)
        del seed
        del value
        tracker.start_phase("optimizer")
        optimizer.step()
        tracker.start_phase("done")


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Inside, torch does not log what fake tensors refuse: it raises that, too."""
    log = logging.getLogger("torch._subclasses.fake_tensor")

    def none(_record: logging.LogRecord) -> bool:
        return False

    log.addFilter(none)
    try:
        yield
    finally:
        log.removeFilter(none)


def fake_copy(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The same network on fake CPU tensors, ready to train; shared weights stay shared."""
    if not isinstance(model, nn.Module):
        return model().train()
    known: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers(), *unregistered(model)):
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        known[id(tensor)] = fake
    return copy.deepcopy(model, known).train()


def _make_state(optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def _report(
    network: nn.Module,
    tracker: LiveStorages,
    shape: tuple[int, ...],
    dtype: str,
    device: str,
    traffic: Traffic,
) -> MemoryReport:
    split = dict.fromkeys(KINDS, 0)
    for storage in tracker.at_peak:
        split[storage.label] += storage.nbytes
    largest = tuple(
        LiveTensor(s.nbytes, s.label, s.operator, s.phase, s.shape, dtype_name(s.dtype))
        for s in sorted(tracker.at_peak, key=lambda s: s.nbytes, reverse=True)[:20]
    )
    # A CPU's allocator gives large tensors back at once.
    plain = expandable = Reserved(tracker.peak, tracker.peak)
    if device == "cuda":
        plain, expandable = (tracker.trace.replay(expandable_segments=e) for e in (False, True))
    return MemoryReport(
        model=getattr(network, "name", type(network).__name__),
        shape=shape,
        dtype=dtype,
        peak=tracker.peak,
        allocated=plain.allocated,
        reserved=plain.reserved,
        reserved_expandable=expandable.reserved,
        workspace=tracker.trace.largest_workspace,
        split=split,
        after_forward=tracker.at_phase_end["forward"],
        operator=tracker.peak_operator,
        node=tracker.peak_node,
        phase=tracker.peak_phase,
        voxels=shape[0] * shape[2] * shape[3] * shape[4],
        parameters=sum(p.numel() for p in network.parameters()),
        macs=tracker.macs,
        largest=largest,
        host=tracker.host_peak,
        to_host=traffic.to_host if tracker.host_peak else 0,
        to_device=traffic.to_device if tracker.host_peak else 0,
    )
