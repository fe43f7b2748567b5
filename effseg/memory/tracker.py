"""Which tensors live when: a dispatch mode that sees every storage being made and being freed."""

import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effseg.common.tensors import storage_use_count
from effseg.expressions.slabs import Abridgement
from effseg.memory.arithmetic import multiply_accumulates
from effseg.memory.fakes import VIEWS, QuickFakes
from effseg.memory.trace import Trace
from effseg.offload.memory import on_host

aten = torch.ops.aten
prim = torch.ops.prim

CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


class Storage:
    """A live allocation: its bytes, the tensor that it was made for, what made it and when."""

    __slots__ = (
        "dtype", "grad_mode", "kind", "nbytes", "node", "operator", "phase", "same_node", "shape", "token",
    )  # fmt: skip

    def __init__(
        self, tensor: torch.Tensor, nbytes: int, kind: str | None, phase: str, operator: str
    ) -> None:
        self.nbytes = nbytes
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.kind = kind
        self.phase = phase
        self.operator = operator
        self.grad_mode = torch.is_grad_enabled()
        self.node = _backward_node()
        self.token: int | None = None  # in the trace
        self.same_node = True  # until an operator of another node of the backward pass finds it alive

    @property
    def label(self) -> str:
        """What it is for; decided at the end, because a tensor's fate tells what it was."""
        if self.kind is not None:
            return self.kind
        if self.phase != "backward" or (self.node is not None and self.same_node):
            return "transient"
        return "saved" if self.grad_mode else "gradients"


class LiveStorages(TorchDispatchMode):
    """Follows the live storages of all tensors made while it is active, and remembers their peak.

    Exact in tensor bytes, since it sees the real order of operators under the real autograd engine and the
    real ends of life. What operators allocate inside it does not see. Counts the multiply-accumulates of
    convolutions and matrix products on the way, for all the slabs that a visited one stands for.

    Memory of the host is counted for itself, in `host_peak`.

    trace: births and deaths in order, and with `workspaces` the workspace that is reckoned with for each
    convolution.

    fakes: the mode beneath, where there is one, which is then asked without torch's way down to it.
    """

    def __init__(
        self,
        abridgement: Abridgement | None = None,
        workspaces: bool = False,
        fakes: QuickFakes | None = None,
    ) -> None:
        super().__init__()
        self._fakes = fakes
        self.trace = Trace()
        self.workspaces = workspaces
        self.abridgement = abridgement or Abridgement()
        self.macs = 0
        self.phase = "setup"
        self.now = 0
        self.peak = 0
        self.peak_operator = ""
        self.peak_node = ""
        self.peak_phase = ""
        self.at_peak: list[Storage] = []
        self.at_phase_end: dict[str, int] = {}
        self.host_now = 0
        self.host_peak = 0
        self._on_host: set[int] = set()
        self._live: dict[int, Storage] = {}
        self._node: int | None = None
        self._pending: str | None = None
        self._unrecorded: list[Storage] = []

    def add(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Count tensors made before; a storage is counted once."""
        for tensor in tensors:
            self._add(tensor, kind, kind)

    def start_phase(self, phase: str) -> None:
        """Close the current phase; what the forward pass leaves behind is what backward has saved."""
        self._settle()
        if self.phase == "setup":
            self.trace.begin_step()
        self.at_phase_end[self.phase] = self.now
        if self.phase == "forward":
            for storage in self._live.values():
                storage.kind = storage.kind or "saved"
        self.phase = phase

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here, and what torch would wrap around each call takes as long as it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is prim.device.default:  # asked for more often than all else together, makes nothing
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        self._settle()
        self._enter_node()
        kwargs = kwargs or {}
        if func in VIEWS:  # nothing is made, and so nothing is looked at
            return self._call(func, args, kwargs)
        name = _name(func)
        if func is aten.add.Tensor and self.phase == "backward" and not torch.is_grad_enabled():
            inside = self._accumulated(args)
            if inside is not None:
                return inside
            self._pending = name  # count the sum only once its dead inputs are gone
        out = self._call(func, args, kwargs)
        self.macs += multiply_accumulates(func, args, out) * self.abridgement.alike
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, None, name)
        if self.workspaces and func in CONVOLUTIONS:
            self.trace.workspace(_bytes_of((args, out)))
        if self._pending is None:
            self._mark(name)
        return out

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        found = NotImplemented if self._fakes is None else self._fakes.quick(func, args, kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found

    def _accumulated(self, args: Any) -> torch.Tensor | None:
        """The sum of two gradients made in place, where the autograd engine would do so.

        The engine adds in place when it holds the only reference, but never under a dispatch mode. It
        matters: a skip's gradient is a view which keeps the whole gradient of a concatenation alive.
        """
        for target, other in (args[:2], args[1::-1]):
            if (
                isinstance(target, torch.Tensor)
                and isinstance(other, torch.Tensor)
                and target.shape == other.shape
                and target.dtype == other.dtype
                and storage_use_count(target) <= 2 + target._is_view()
            ):
                self._mark("aten.add_.Tensor")
                result: torch.Tensor = aten.add_.Tensor(target, other)
                return result
        return None

    def _add(self, tensor: torch.Tensor, kind: str | None, operator: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._on_host:
            return
        if on_host.get():
            self._add_on_host(key, storage)
            return
        entry = Storage(tensor, storage.nbytes(), kind, self.phase, operator)
        self._live[key] = entry
        self._unrecorded.append(entry)
        if self._pending is None:
            self._record()
        self.now += entry.nbytes
        weakref.finalize(storage, self._free, key).atexit = False

    def _add_on_host(self, key: int, storage: torch.UntypedStorage) -> None:
        self._on_host.add(key)
        self.host_now += storage.nbytes()
        self.host_peak = max(self.host_peak, self.host_now)
        weakref.finalize(storage, self._free_on_host, key, storage.nbytes()).atexit = False

    def _free_on_host(self, key: int, nbytes: int) -> None:
        self._on_host.remove(key)
        self.host_now -= nbytes

    def _free(self, key: int) -> None:
        entry = self._live.pop(key)
        self.now -= entry.nbytes
        if entry.token is None:
            self._unrecorded.remove(entry)
        else:
            self.trace.free(entry.token)
        entry.same_node = entry.same_node and entry.node == _backward_node()

    def _enter_node(self) -> None:
        node = _backward_node() if self.phase == "backward" else None
        if node != self._node:
            self._node = node
            for entry in self._live.values():
                entry.same_node = entry.same_node and entry.node == node

    def _settle(self) -> None:
        if self._pending is not None:
            self._mark(self._pending)
            self._pending = None
            self._record()

    def _record(self) -> None:
        for entry in self._unrecorded:
            entry.token = self.trace.allocate(entry.nbytes)
        self._unrecorded.clear()

    def _mark(self, operator: str) -> None:
        if self.now > self.peak:
            self.peak, self.peak_operator, self.peak_phase = self.now, operator, self.phase
            node = torch._C._current_autograd_node()
            self.peak_node = "" if node is None else node.name()
            self.at_peak = list(self._live.values())


@cache
def _name(func: Any) -> str:
    return str(func)


def _backward_node() -> int | None:
    """The node of the graph whose backward runs now, None outside."""
    node: Any = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def _bytes_of(tree: Any) -> int:
    """Of all tensors."""
    return sum(t.nbytes for t in tree_leaves(tree) if isinstance(t, torch.Tensor))
