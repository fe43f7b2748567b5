"""A tensor that remembers how it is made until something needs its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from effseg import functional
from effseg.conversion import watch
from effseg.conversion.outputs import convolve
from effseg.deferred import Deferred, plain
from effseg.losses import LossOptions
from effseg.settings import Captured
from effseg.slabs import Window


class Convolution(NamedTuple):
    """One that has not run yet: what follows decides whether it needs statistics, or runs inside a loss."""

    x: Deferred
    weight: Tensor
    bias: Tensor | None
    window: Window

    @property
    def shape(self) -> tuple[int, ...]:
        n, _, d, h, w = self.x.shape
        return (n, self.weight.shape[0], *self.window.output_size((d, h, w)))

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def is_head(self) -> bool:
        """Whether it is a matrix for every voxel."""
        return self.window == Window((1, 1, 1))


Value = Tensor | Deferred | Convolution
FOREIGN = (
    "a torch.autograd.Function was given a lazy tensor, whose gradient would be lost; give it "
    "tensor.materialise() (effseg.conversion.LazyTensor)"
)
Handler = Callable[..., Any]


class LazyTensor(Tensor):
    """Values (N, C, D, H, W) that are stored, deferred, or a convolution that has not run.

    It is a `torch.Tensor` by type, shape, dtype and device. An operator that `rules` knows gives another
    lazy tensor; any other gets `materialise()`, and the values are computed once. Gradients flow through
    either way. It has no memory of its own: code in C++ that reads a tensor without asking torch's
    function protocol cannot use it.
    """

    handlers: ClassVar[dict[Any, Handler]] = {}
    """By torch's function; an entry returns NotImplemented for arguments that it does not take."""
    _value: Value
    _captured: Captured

    @staticmethod
    def __new__(cls, value: Value) -> LazyTensor:
        shape, device = tuple(value.shape), _device(value)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=value.dtype, device=device)
        made._value, made._captured = value, Captured()
        if torch.is_grad_enabled() and any(t.requires_grad for t in made.operands()):
            with torch._C.DisableTorchFunctionSubclass():
                made.requires_grad_().register_hook(_refuse_gradient)
        return made

    @property
    def value(self) -> Value:
        """Raises `RuntimeError` for what a torch.autograd.Function gave its own graph."""
        with torch._C.DisableTorchFunctionSubclass():
            foreign = self.grad_fn is not None
        if foreign:
            raise RuntimeError(FOREIGN)
        return self._value

    def become(self, value: Value) -> LazyTensor:
        """Change in place, as an operator that works in place does."""
        self._value = value
        return self

    def deferred(self, dtype: torch.dtype) -> Deferred:
        """An expression in the compute type."""
        value = self.value
        if isinstance(value, Deferred) and value.dtype == dtype:
            return value
        return plain(self.materialise(), dtype)

    def materialise(self) -> Tensor:
        """The values as an ordinary tensor; computed once, with the settings under which it was made."""
        value = self.value
        if not isinstance(value, Tensor):
            with self._captured.restored():
                value = _computed(value)
        self.become(value)
        return value

    @property
    def has_head(self) -> bool:
        """Whether it is features and a 1x1x1 convolution that has not run: logits."""
        return isinstance(self.value, Convolution) and self.value.is_head

    def segmentation_loss(self, labels: Tensor, options: LossOptions) -> Tensor:
        """`effseg.functional.segmentation_loss` of logits, which it does not make."""
        assert isinstance(self.value, Convolution)
        head = self.value
        chosen = {f.name: getattr(options, f.name) for f in fields(options)}
        with self._captured.restored():
            return functional.segmentation_loss(head.x, labels, head.weight, head.bias, **chosen)

    def operands(self) -> tuple[Tensor, ...]:
        """The tensors that gradients reach."""
        value = self.value
        if isinstance(value, Tensor):
            return (value,)
        if isinstance(value, Deferred):
            return value.tensors
        parameters = (value.weight,) if value.bias is None else (value.weight, value.bias)
        return (*value.x.tensors, *parameters)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = cls.handlers.get(func)
        if handler is not None:
            found = handler(*args, **kwargs)
            if found is not NotImplemented:
                return found
        watch.materialised(func, args)
        real_args, real_kwargs = tree_map(real, (args, kwargs))
        return tree_map(lazy, func(*real_args, **real_kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func}: a lazy tensor has no values here; pass tensor.materialise()")


METADATA = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_quantized",
        "is_mkldnn", "is_meta", "is_nested", "itemsize", "nbytes",
    )),
    *(getattr(Tensor, name) for name in (
        "dim", "size", "numel", "nelement", "is_floating_point", "is_complex", "element_size", "__len__",
        "__hash__",
    )),
    torch.numel, torch.is_floating_point, torch.is_complex,
}  # fmt: skip


def _refuse_gradient(grad: Tensor) -> None:
    """Gradients go to what a lazy tensor is made of. Called where one came past torch's function protocol."""
    raise RuntimeError(FOREIGN)


def lazy(value: Any) -> Any:
    """Floating-point features become lazy, anything else stays as it is."""
    if not isinstance(value, Tensor) or isinstance(value, LazyTensor):
        return value
    is_features = value.dim() == 5 and value.is_floating_point() and value.numel() > 0
    return LazyTensor(value) if is_features else value


def real(value: Any) -> Any:
    return value.materialise() if isinstance(value, LazyTensor) else value


def _computed(value: Deferred | Convolution) -> Tensor:
    if isinstance(value, Deferred):
        return functional.materialise(value)
    return convolve(value.x, value.weight, value.bias, value.window, statistics=False)[0]


def _device(value: Value) -> torch.device:
    if isinstance(value, Convolution):
        return value.weight.device
    return value.device
