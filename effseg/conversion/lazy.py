"""A tensor that remembers how it is made until something needs its values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from effseg import functional
from effseg.conversion import mutation, watch
from effseg.conversion.functions import (
    ALIASES,
    DEVICE,
    HOOKS,
    LAID_OUT,
    METADATA,
    ORDINARY,
    asked_by_checkpoint,
)
from effseg.conversion.standing import Attached, Changed, Standing
from effseg.conversion.streamed import Layer, Logits
from effseg.conversion.surroundings import Surroundings
from effseg.conversion.values import Convolution, Value, computed, constant, operands, recipe, stored_as
from effseg.errors import InputError
from effseg.expressions.base import Deferred
from effseg.expressions.joins import cast
from effseg.expressions.layers import plain
from effseg.losses import LossOptions
from effseg.parallel.partition import current

Handler = Callable[..., Any]
S = TypeVar("S", bound=Tensor)
NEEDS_LOGITS = (
    "expected lazy_logits=False in effseg.convert under DistributedDataParallel with find_unused_parameters "
    "or static_graph, which copies a network's outputs, so that lazy logits would be made after all"
)
CHANGED = (
    "a tensor changed in place after it had been used by an operator that has not run yet; convert with "
    "lazy_logits=False, or use outputs before their network changes"
)
SPLIT = (
    "operator {}: expected one that a converted network takes over (its report names the others) where "
    "processes share a volume"
)
HOOK_TOO_LATE = (
    "{}: expected before other operators read the tensor: a converted network's gradients do not pass "
    "through one that is not stored; effseg.restore gives the network back"
)


class LazyTensor(Tensor):
    """Values (N, C, D, H, W) that are stored, deferred, or a convolution that has not run.

    It is a `torch.Tensor` by type, shape, strides (those that torch's own would have), dtype, device and
    place in autograd's graph.
    An operator that `rules` knows gives another lazy tensor; any other gets `materialise()`, and the values
    are computed once, in the grad mode in which the tensor was made. Code that does not ask torch's function
    protocol (a torch.autograd.Function, C++) finds the values and the gradient too: see `standing`.
    """

    handlers: ClassVar[dict[Any, Handler]] = {}
    """By torch's function; an entry returns NotImplemented for arguments that it does not take."""
    _value: Value
    _versions: tuple[int, ...]
    _was_taken: bool  # by an operator that keeps what it is made of
    _memory_is_kept: bool  # by one that keeps the stored values
    _memory_is_lent: bool  # to one that keeps the stored values, where torch's own would have copied them
    _memory_is_seen: bool  # by code that may look at the stored values again
    _node: Any  # of autograd's graph, unless foreign code gave it another
    _around: Surroundings

    @staticmethod
    def __new__(cls, value: Value, strides: Sequence[int] | None = None) -> LazyTensor:
        around = Surroundings()
        if not around.records and not isinstance(value, Tensor):
            value = constant(value)
        inputs = operands(value)
        with torch._C.DisableTorchFunctionSubclass():
            if around.records and any(t.requires_grad for t in inputs):
                how = None if isinstance(value, Tensor) else recipe(value)
                made = Standing.apply(partial(_wrapper, cls, value, strides), how, *inputs)
            else:
                made = _wrapper(cls, value, strides)
            made._node = made.grad_fn
        made._around, made._was_taken = around, False
        made._remember(value)
        return made

    @property
    def value(self) -> Value:
        """What it is now. Raises `RuntimeError` where that is no longer known."""
        node = self._edge()
        if node is not self._node:
            if "_DDPSink" in node.name():
                raise RuntimeError(NEEDS_LOGITS)
            self._attach(self._constant())
        elif not isinstance(self._value, Tensor) and self._versions != mutation.versions(self.operands()):
            raise RuntimeError(CHANGED)
        elif not isinstance(self._value, Tensor) and self._around.are_outside():
            self._store()
        return self._value

    def taken(self) -> Value:
        """The value, for an operator that keeps what it is made of."""
        self._was_taken = True
        value = self.value
        self._memory_is_kept = isinstance(value, Tensor)
        return value

    def stored(self) -> Tensor:
        """The values for an operator that keeps them."""
        found = self.read()
        self._was_taken = self._memory_is_kept = True
        return found

    @property
    def records(self) -> bool:
        """Whether this is the grad mode that it was made in: an operator in place may change what it is."""
        return self._around.are_now()

    def surroundings(self) -> AbstractContextManager[None]:
        """Those that it was made in: grad mode, settings."""
        return self._around.restored()

    def become(self, value: Value) -> LazyTensor:
        """Change in place, as an operator that works in place does."""
        self._remember(value)
        self._rebase()
        return self

    def settle(self, value: Value) -> None:
        """The same values by other means."""
        self._remember(value)

    def deferred(self, dtype: torch.dtype) -> Deferred:
        """An expression in the compute type."""
        value = self.value
        if isinstance(value, Layer) or (isinstance(value, Convolution) and value.reads_image):
            with self._around.restored():
                self.settle(value := value.deferred())
        if isinstance(value, Deferred):
            self._was_taken = True
            return cast(value, dtype)
        return plain(self.stored(), dtype, value.shape[2])

    def lent(self, dtype: torch.dtype) -> Deferred:
        """`deferred`, for an operator that keeps what torch's own would not: it needs memory that nobody else
        can change."""
        if torch.is_grad_enabled() and self.memory_is_seen:
            with self._around.settings():
                return plain(self.read().clone(), dtype)
        found = self.deferred(dtype)
        self._memory_is_lent = isinstance(self._value, Tensor)
        return found

    def materialise(self) -> Tensor:
        """The values as an ordinary tensor; computed once, with the settings under which it was made."""
        self._show()
        return self.read()

    def as_subclass(self, cls: type[S]) -> S:
        """The values as a tensor of another class (MONAI's MetaTensor): torch's asks no function protocol.
        Raises `InputError` where the volume is split."""
        if issubclass(cls, LazyTensor):
            return self  # type: ignore[return-value]
        _refuse_split("as_subclass")
        watch.materialised(Tensor.as_subclass)
        return self.laid_out_for_others().as_subclass(cls)

    def _show(self) -> None:
        """Let others look at the stored values and change them; those that are lent stay as they are."""
        self.read()
        if self._memory_is_lent and torch.is_grad_enabled():
            self.own_memory()
        self._memory_is_seen = True

    def read(self) -> Tensor:
        """Values as an ordinary tensor, for code that does not look at them again."""
        value = self.value
        if isinstance(value, Tensor):
            return value
        return self._store()

    def _store(self) -> Tensor:
        with self._around.restored():
            found = computed(self._value)
            self.settle(stored_as(found, self._value.shape[2]))
        return found

    def laid_out(self) -> Tensor:
        """The values in memory as the strides say: for views and for code that reads memory."""
        stored = self.read()
        if stored.stride() != self.stride() and not stored.is_contiguous():
            with (
                self._around.settings(),
                torch.set_grad_enabled(stored.requires_grad),
                torch._C.DisableTorchFunction(),  # no network is to see this
            ):
                stored = stored.contiguous()
                self.settle(stored_as(stored, self._value.shape[2]))
        return stored

    def laid_out_for_others(self) -> Tensor:
        """`laid_out`, for code that may look at the memory again."""
        self._show()
        found = self.laid_out()
        self._memory_is_seen = True
        return found

    @property
    def has_head(self) -> bool:
        """Whether it is features and a 1x1x1 convolution that has not run: logits."""
        value = self.value
        return isinstance(value, Logits) or (isinstance(value, Convolution) and value.is_head)

    @property
    def effseg_loss(self) -> Callable[[Tensor, Tensor, LossOptions], Tensor] | None:
        """See `effseg.losses.OWN_LOSS`."""
        return logits_loss if self.has_head else None

    @property
    def memory_is_seen(self) -> bool:
        """Whether there are stored values that other code may look at or change."""
        return isinstance(self._value, Tensor) and self._memory_is_seen

    def own_memory(self) -> None:
        """Copy stored values, which are about to change, where only operators kept them that are torch's no
        longer: torch's own would have copied them, or need them no more."""
        if self._memory_is_kept and not self._memory_is_seen and isinstance(self._value, Tensor):
            with self._around.settings(), torch.set_grad_enabled(self._value.requires_grad):
                self.settle(self._value.clone())

    def operands(self) -> tuple[Tensor, ...]:
        """The tensors that it is made of."""
        return operands(self._value)

    def keep_parameters(self) -> None:
        """Be made of copies of parameters, whose gradients those get: fused optimizers, and code that changes
        `.data`, change parameters without torch's counting it."""
        parts = self.operands()
        if self._versions == mutation.versions(parts) and any(map(_is_parameter, parts)):
            self.settle(recipe(self._value)([t.clone() if _is_parameter(t) else t for t in parts]))

    def _remember(self, value: Value) -> None:
        self._value = value
        self._memory_is_kept = self._memory_is_lent = self._memory_is_seen = False
        self._versions = mutation.versions(operands(value))
        if isinstance(value, Tensor):
            mutation.settled(self)
        else:
            mutation.recorded(self)

    @property
    def foreign_node(self) -> Any:
        """The node of autograd's graph that other code made of this tensor's; None where none did."""
        node = self._edge()
        return None if node is self._node else node

    def _edge(self) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn

    def _rebase(self) -> None:
        """Take the place in autograd's graph of what it is made of now."""
        inputs = self.operands()
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            how = None if isinstance(self._value, Tensor) else recipe(self._value)
            with torch._C.DisableTorchFunctionSubclass():
                Changed.apply(self, how, *inputs)
            self._node = self._edge()

    def _constant(self) -> Tensor:
        """The values without a gradient."""
        with torch.no_grad(), self._around.settings():
            return computed(constant(self._value))

    def _attach(self, values: Tensor) -> None:
        """Become stored values whose gradient goes where foreign code sees it go."""
        with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
            self._remember(Attached.apply(self, values))
            self._node = self.grad_fn

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == DEVICE and asked_by_checkpoint(sys._getframe(1)):
            real(args[0])
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = cls.handlers.get(func)
        if handler is not None:
            found = handler(*args, **kwargs)
            if found is not NotImplemented:
                return found
        watch.materialised(func)
        return foreign(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For code that asks no function protocol, below autograd: the values, stored from now on."""
        real_args, real_kwargs = tree_map(_touched, (args, kwargs or {}))
        if func in ALIASES and isinstance(args[0], LazyTensor) and _keeps_shape(func, args):
            return _wrapped(cls, real_args[0])
        return func(*real_args, **real_kwargs)


def logits_loss(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """`effseg.functional.segmentation_loss` of logits: lazy ones, which it does not make, or stored ones."""
    chosen = {f.name: getattr(options, f.name) for f in fields(options)}
    if not isinstance(logits, LazyTensor):
        return functional.segmentation_loss(logits, labels, **chosen)
    head = logits.taken()
    assert isinstance(head, Convolution | Logits)
    with logits._around.settings():
        if isinstance(head, Logits):
            return head.segmentation_loss(labels, **chosen)
        return functional.segmentation_loss(head.x, labels, head.weight, head.bias, **chosen)


def foreign(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of torch with ordinary tensors; what it gives is lazy again. Raises `InputError` where
    the volume is split: nobody knows which rows of others it would read."""
    _refuse_split(resolve_name(func) or getattr(func, "__name__", func))
    if func in HOOKS and isinstance(args[0], LazyTensor):
        _check_hook(func, args[0])
    written = mutation.written(func, args, kwargs)
    for changing in written:
        if isinstance(changing, LazyTensor):
            changing.own_memory()
    store = _viewed if func in LAID_OUT else LazyTensor.read
    originals: dict[int, LazyTensor] = {}

    def stored(x: Any) -> Any:
        if not isinstance(x, LazyTensor):
            return x
        found = store(x)
        originals[id(found)] = x
        return found

    real_args, real_kwargs = tree_map(stored, (args, kwargs))
    mutation.before([t.read() if isinstance(t, LazyTensor) else t for t in written])
    found = func(*real_args, **real_kwargs)
    for changed in written:
        if isinstance(changed, LazyTensor):
            changed.become(changed._value)
    if func in ORDINARY:
        return found
    results = tree_map(lambda x: originals.get(id(x), x), found)
    return tree_map(partial(lazy, seen=_see_views(results, originals.values())), results)


def _refuse_split(operator: Any) -> None:
    if current() is not None:
        raise InputError(SPLIT.format(operator))


def _viewed(x: LazyTensor) -> Tensor:
    if x._memory_is_lent:
        x._show()
    return x.laid_out()


def _see_views(results: Any, of: Iterable[LazyTensor]) -> bool:
    """Let the memory of which results are views be looked at; whether there is any."""
    made = [x for x in tree_leaves(results) if isinstance(x, Tensor) and not isinstance(x, LazyTensor)]
    memory = {_storage(x) for x in made}
    viewed = [x for x in of if isinstance(x._value, Tensor) and _storage(x._value) in memory]
    for x in viewed:
        x._memory_is_seen = True
    return bool(viewed)


def _storage(x: Tensor) -> int:
    return 0 if x.layout != torch.strided else x.untyped_storage()._cdata


def _check_hook(func: Any, x: LazyTensor) -> None:
    if x._was_taken:
        raise RuntimeError(HOOK_TOO_LATE.format(func.__name__))


def _is_parameter(t: Tensor) -> bool:
    """Or a view of one, frozen or not."""
    base = t._base if t._is_view() and t._base is not None else t
    return isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad)


def lazy(value: Any, seen: bool = True) -> Any:
    """Floating-point features become lazy, anything else stays as it is. seen: whether others have them, who
    know their strides."""
    if not isinstance(value, Tensor) or isinstance(value, LazyTensor):
        return value
    if value.dim() != 5 or not value.is_floating_point() or value.numel() == 0:
        return value
    _refuse_split("of a tensor that no operator of this package gave")
    made = LazyTensor(value, value.stride() if seen else None)
    made._memory_is_seen = seen
    return made


def keep_parameters() -> None:
    """Of all that is recorded: a network's outputs, and what its modules remember, may be read after an
    optimizer's step."""
    for what in mutation.pending():
        what.keep_parameters()


def real(value: Any) -> Any:
    return value.materialise() if isinstance(value, LazyTensor) else value


def _wrapper(cls: type[LazyTensor], value: Value, strides: Sequence[int] | None = None) -> Any:
    """A tensor that has no memory; contiguous unless `strides` say otherwise."""
    shape = tuple(value.shape)
    return Tensor._make_wrapper_subclass(cls, shape, strides, dtype=value.dtype, device=value.device)


def _wrapped(cls: type[LazyTensor], values: Tensor) -> LazyTensor:
    """A lazy tensor of stored values, without a place in autograd's graph: whoever asked gives it one."""
    made: LazyTensor = _wrapper(cls, values)
    made._around, made._node, made._was_taken = Surroundings(), None, False
    made._remember(values)
    made._memory_is_seen = True
    return made


def _touched(x: Any) -> Any:
    """The values for code below autograd. What reads the tensor from now on reads them too, so that a pass
    that is run again finds what the first one found."""
    if not isinstance(x, LazyTensor):
        return x
    if not isinstance(x._value, Tensor):
        x._remember(x._constant())
        x._node = TOUCHED
    assert isinstance(x._value, Tensor)
    x._memory_is_seen = True
    return x._value.detach()


class _Touched:
    def name(self) -> str:
        return "touched"


TOUCHED = _Touched()


def _keeps_shape(func: Any, args: Any) -> bool:
    return func is not torch.ops.aten.view.default or tuple(args[1]) == tuple(args[0].shape)
