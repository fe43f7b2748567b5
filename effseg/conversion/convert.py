"""`effseg.convert`: a network of nnU-Net, MONAI or one's own, with this package's memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from effseg.common.tensors import unregistered
from effseg.conversion import rules as _rules  # noqa: F401  lazy tensors follow them
from effseg.conversion.boundary import (
    NO_TRACE,
    Carrier,
    Noticing,
    entering,
    mapped,
    ordinary,
    real_at_hooks,
    refuse_tracing,
)
from effseg.conversion.examine import examine
from effseg.conversion.lazy import LazyTensor, keep_parameters, logits_loss, real
from effseg.conversion.recompute import Block, blocks_run_again, is_block
from effseg.conversion.report import MOST_KEPT, ConversionReport, StepBytes, one_line, step_bytes
from effseg.conversion.stream_plan import last_convolutions
from effseg.conversion.streamed import Streaming, place, streaming
from effseg.errors import InputError
from effseg.losses import OWN_LOSS
from effseg.memory.choice import usable
from effseg.memory.predict import peak_training_memory
from effseg.memory.units import format_bytes
from effseg.parallel.partition import current

MODES = ("raw", "block", "stream", "auto")
M = TypeVar("M", bound=nn.Module)


class Settings(NamedTuple):
    """memory: of MODES; budget: in bytes, or as in "24GB", for "auto"; lazy_logits: see `convert`; lasts:
    names of the weights of convolutions that the loss makes in "stream", which takes networks that have such.
    """

    memory: str
    budget: int | str | None
    lazy_logits: bool
    lasts: frozenset[str] = frozenset()


class Converted(nn.Module):
    """What a converted network's class is mixed with; with this alone, its `forward` is the original's."""

    effseg_settings: Settings
    effseg_choices: dict[Any, str]
    effseg_report: ConversionReport
    effseg_steps: list[tuple[StepBytes, StepBytes]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current() is not None and not isinstance(self, Deferring):
            raise InputError(
                f"{_base(type(self)).__name__}: expected a network of this package's operators where "
                f"processes share a volume, got one that convert left alone: leave_alone=False converts it"
            )
        return super().__call__(*args, **kwargs)

    @property
    def conversion_report(self) -> ConversionReport:
        return dataclasses.replace(self.effseg_report, steps=self._steps)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Buffers, like parameters, go where `.to` sends them and stay shared with the original."""
        before = [(module, name, t) for module in self.modules() for name, t in module._buffers.items()]
        super()._apply(fn, recurse)
        for module, name, tensor in before:
            moved = module._buffers[name]
            if (
                tensor is not None
                and moved is not None
                and torch._has_compatible_shallow_copy_type(tensor, moved)
            ):
                tensor.data = moved
                module._buffers[name] = tensor
        return self

    def _steps(self) -> tuple[StepBytes, StepBytes]:
        """Of the original and of this network; found out once."""
        if not self.effseg_steps:
            shape = self.effseg_report.shape
            if shape is None:
                raise ValueError("report: expected a network that could be examined")
            original = step_bytes(restore(self), shape)
            self.effseg_steps.append((original, self._step(shape) or original))
        return self.effseg_steps[0]

    def _step(self, shape: tuple[int, ...]) -> StepBytes | None:
        """Where it is not the original's."""
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made when needed, so that pickle cannot find it by name."""
        return _rebuilt, (_base(type(self)), _mixin(type(self))), self.__dict__


class Deferring(Converted):
    """A converted network that runs on lazy tensors."""

    follows_autocast = True

    @torch.compiler.disable  # a compiled caller runs it as it is
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        refuse_tracing()
        settings, own = self.effseg_settings, super().forward
        if settings.memory not in MODES[:2] and current() is not None:
            raise InputError(
                f"memory: expected raw or block where processes share a volume, got {settings.memory!r}"
            )
        carrier = Carrier((args, kwargs))
        args, kwargs = mapped(entering, (args, kwargs))
        mode = self._mode((args, kwargs))
        defers = settings.lazy_logits and self.training and torch.is_grad_enabled()
        streams = self._streaming(defers) if mode == "stream" else None
        with (
            blocks_run_again.set(mode in ("block", "stream")),
            streaming.set(streams),
            real_at_hooks(self),
            Noticing(),
        ):
            found = own(*args, **kwargs)
        outputs = mapped(lambda x: carrier.carried(_logits(x) if defers else ordinary(x)), found)
        keep_parameters()
        return outputs

    def _streaming(self, defers: bool) -> Streaming:
        """defers: whether logits are lazy, so that a loss can make what leads to them."""
        lasts = self.effseg_settings.lasts if defers else frozenset()
        return Streaming(frozenset(place(p) for name, p in self.named_parameters() if name in lasts))

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script asks for it."""
        raise RuntimeError(NO_TRACE.format("torch.jit.script"))

    def _step(self, shape: tuple[int, ...]) -> StepBytes | None:
        memory = self.effseg_settings.memory
        return step_bytes(as_converted(self, MODES[0] if memory == "auto" else memory), shape)

    def _mode(self, inputs: Any) -> str:
        settings = self.effseg_settings
        if settings.memory != "auto" or not (self.training and torch.is_grad_enabled()):
            return settings.memory
        image = next((x for x in tree_leaves(inputs) if isinstance(x, LazyTensor)), None)
        if image is None:
            raise InputError('memory: "auto" expects an image (N, C, D, H, W) among the inputs, got none')
        key = (tuple(image.shape), image.device.type, torch.is_autocast_enabled(image.device.type))
        if key not in self.effseg_choices:
            budget = usable(settings.budget, image.device)
            self.effseg_choices[key] = choose(self, *key, budget, _other_inputs(inputs, image))
        return self.effseg_choices[key]


class ConvertedBlock(Block):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (_base(type(self)), ConvertedBlock), self.__dict__


def convert(
    model: M,
    *,
    memory: str = "raw",
    memory_budget: int | str | None = None,
    lazy_logits: bool = True,
    strict: bool = True,
    shape: Sequence[int] | None = None,
    leave_alone: bool = True,
) -> M:
    """The same network with the same weights, in a fraction of the memory.

    model: any `nn.Module` over (N, C, D, H, W) whose `forward` calls torch's functions: networks of
        dynamic-network-architectures (nnU-Net), MONAI, and others. It is left as it is; the converted one is
        an instance of the same class and has the same parameters and buffers, not copies of them (as with
        `torch.compile`), the same `state_dict` keys, and its own hooks. They stay shared when the converted
        one is moved by `.to()`; moving the original replaces its buffers, as torch does, and leaves these.
    memory: "raw" keeps one tensor per convolution, its raw output. "block" keeps what leaves each block of
        convolutions and runs the block's inside again in backward. "stream" does so, too, and stores neither
        the output of convolutions that read an image of few channels and without gradient, nor that of the
        last one: its norm, activation and 1x1x1 head run with the loss, slab by slab, in forward and again
        in backward, for `effseg.SegmentationLoss` and `effseg.losses.dice_cross_entropy`; the last block
        is not run again. It takes networks that end in that way; any other use of their logits makes
        them once. "auto" takes for every new input shape the first of the three, as far as the network can
        do them, whose predicted reservation fits `memory_budget` (bytes, or as in "24GB"; by default the
        GPU's memory).
    lazy_logits: in training, a network that ends in a 1x1x1 convolution returns logits as a `LazyTensor`:
        `effseg.SegmentationLoss` and `effseg.losses.dice_cross_entropy` then never make them; any other
        use makes them once. Of other logits, which are stored, those two make probabilities slab by slab.
        Needs True for "stream", and False under DDP with find_unused_parameters or static_graph.
    shape: an input's (N, C, D, H, W) to examine the network with, on fake tensors, for the report; by
        default (1, C, 64, 64, 64) and a few more where that does not fit.
    strict: whether to refuse a model of which nothing could be taken over.
    leave_alone: whether a network whose forward pass, converted ("raw" for "auto"), would still save more
        than 75 % of the bytes that it saves for backward keeps its own `forward`, because that does not
        pay; `.conversion_report` says so. Everything else is as promised: such a network is converted in
        name, has no memory modes, predicts nothing for "auto", and returns ordinary logits. False converts
        it all the same, and so does a `memory_budget`, which a network left alone could not keep.

    What was taken over, what was left and why, and what a step keeps and peaks at before and after is in
    `.conversion_report`, printable. Values, gradients and buffers equal the original's but for rounding,
    whatever surrounds the layers: grad modes, in-place operators, hooks, checkpoints, functions of one's own.
    Compute types follow autocast as convolutions do. What differs: dropout of single elements draws another
    mask at the same seed, for memory is channels last. Modules with hooks get and give stored tensors, which
    costs their memory; in what runs again, hooks are called once more in backward. torch.jit, ONNX,
    torch.export, torch.func and second derivatives raise `RuntimeError`: `effseg.restore` is for them.
    Raises `TypeError` for what is no module or is wrapped already (DDP, torch.compile: convert first), and
    `InputError` (a `ValueError`) for unknown options, where nothing can be taken over, and where a network
    cannot do "stream".
    """
    if memory not in MODES:
        raise InputError(f"memory: expected one of {', '.join(MODES)}, got {memory!r}")
    if memory_budget is not None and memory != "auto":
        raise InputError(f"memory_budget: expected None with memory={memory!r}, got {memory_budget!r}")
    if memory == "stream" and not lazy_logits:
        raise InputError('lazy_logits: expected True with memory="stream", got False')
    _check_model(model)
    converted = restore(model)
    report = examine(converted, shape, _with_blocks if memory in ("block", "stream") else None)
    if strict and report.problem is None and not report.taken:
        raise InputError(
            f"model: expected convolutions followed by norms, got {type(model).__name__} with none that can "
            f"be taken over; strict=False returns it all the same\n{report}"
        )
    settings = Settings(memory, memory_budget, lazy_logits)
    if leave_alone and memory_budget is None and report.kept is not None and report.kept.share > MOST_KEPT:
        return _marked(converted, Converted, settings, dataclasses.replace(report, left_alone=True))
    lasts: frozenset[str] = frozenset()
    if memory == "stream" or (memory == "auto" and lazy_logits and report.problem is None):
        lasts = last_convolutions(converted, report, required=memory == "stream")
        report = dataclasses.replace(report, lasts=tuple(sorted(lasts)))
    return _mix(converted, settings._replace(lasts=lasts), report)


def _mix(model: M, settings: Settings, report: ConversionReport) -> M:
    """Change the classes of a network and of its blocks."""
    _with_blocks(model)
    return _marked(model, Deferring, settings, report)


def _with_blocks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name and is_block(module):
            module.__class__ = _mixed(type(module), ConvertedBlock)


def _marked(model: M, mixin: type, settings: Settings, report: ConversionReport) -> M:
    model.__class__ = _mixed(type(model), mixin)
    vars(model).update(effseg_settings=settings, effseg_choices={}, effseg_report=report, effseg_steps=[])
    return model


def as_converted(model: Converted, memory: str) -> nn.Module:
    """The same network in another mode."""
    settings, report = model.effseg_settings, model.effseg_report
    return _mix(restore(model), Settings(memory, None, True, settings.lasts), report)


def choose(
    model: Converted, shape: tuple[int, ...], device: str, low: bool, budget: int, others: Any = None
) -> str:
    """The first of "raw", "block" and, where it can, "stream" that is predicted to reserve no more than
    `budget` bytes, with AdamW.

    others: what the network is called with, if with more than the image.
    """
    needed = {}
    dtype, kind = "bf16" if low else "fp32", "cpu" if device == "cpu" else "cuda"
    for mode in MODES[: 3 if model.effseg_settings.lasts else 2]:
        like = as_converted(model, mode)
        called = like if others is None else _AsCalled(like, others)
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            try:
                needed[mode] = peak_training_memory(called, shape, dtype=dtype, device=kind).reserved
            except Exception as error:  # a network may refuse fake tensors in any way
                raise InputError(
                    f'memory: "auto" could not try {_base(type(model)).__name__} on fake tensors, expected '
                    f'"raw" or "block" instead: {one_line(error)}'
                ) from error
        if needed[mode] <= budget:
            return mode
    needs = ", ".join(f"{format_bytes(count)} ({mode})" for mode, count in needed.items())
    raise InputError(
        f"memory: training {_base(type(model)).__name__} on {'x'.join(map(str, shape))} in {dtype} needs "
        f"{needs}, the budget is {format_bytes(budget)}"
    )


class _Image(Enum):
    """Where the image was among a network's inputs."""

    HERE = 0


class _AsCalled(nn.Module):
    """A network of an image, the other inputs being what they were."""

    follows_autocast = True

    def __init__(self, network: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.network, self.inputs = network, inputs

    def forward(self, image: Tensor) -> Any:
        args, kwargs = tree_map(lambda x: image if x is _Image.HERE else x, self.inputs)
        return self.network(*args, **kwargs)


def _other_inputs(inputs: Any, image: Tensor) -> Any:
    """The inputs with a place for the image; None where there are no others."""
    if all(x is image for x in tree_leaves(inputs)):
        return None
    return tree_map(lambda x: _Image.HERE if x is image else real(x), inputs)


def restore(model: M) -> M:
    """The network as it was before `convert`, with the converted one's parameters and buffers, shared.

    Raises `TypeError` for what is no module or is wrapped (DDP, torch.compile).
    """
    _check_model(model)
    plain = copy.deepcopy(model, _shared(model))
    for module in plain.modules():
        if isinstance(module, (Converted, ConvertedBlock)):
            module.__class__ = _base(type(module))
    for name in ("effseg_settings", "effseg_choices", "effseg_report", "effseg_steps"):
        plain.__dict__.pop(name, None)
    return plain


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise TypeError(f"model: expected a network, to be wrapped afterwards, got {type(model).__name__}")


def _shared(model: nn.Module) -> dict[int, Any]:
    """For deepcopy: parameters and buffers stay, other tensors with a graph (outputs that a network
    remembers) lose it."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return memo | {id(t): t if t.is_leaf else real(t).detach() for t in unregistered(model)}


def _logits(x: Tensor) -> Tensor:
    """Lazy ones stay so."""
    if not isinstance(x, LazyTensor) or x.has_head:
        return x
    found = ordinary(x)
    if found.shape[1] > 1:
        setattr(found, OWN_LOSS, logits_loss)
    return found


_mixtures: dict[tuple[type, type], type] = {}


def _mixed(base: type, mixin: type) -> type:
    """One class for each pair, so that copies are of the same class."""
    if (base, mixin) not in _mixtures:
        made = type(f"Converted{base.__name__}", (mixin, base), {"__module__": base.__module__})
        _mixtures[base, mixin] = made
    return _mixtures[base, mixin]


def _base(mixed: type) -> type:
    return mixed.__bases__[1]


def _mixin(mixed: type) -> type:
    return mixed.__bases__[0]


def _rebuilt(base: type, mixin: type) -> nn.Module:
    made: nn.Module = object.__new__(_mixed(base, mixin))
    return made
