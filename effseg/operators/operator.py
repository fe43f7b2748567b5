"""What an operator is: two functions over tensors, of which autograd's node and torch.compile's opaque
operator are both made.

    forward(ops, static, tensors)                       -> outputs, what backward needs besides
    backward(ops, static, own, tensors, needed, grads)  -> the gradient of every tensor, or None

with ops an algorithm (`effseg.algorithms`), static a NamedTuple of what is no tensor, and tensors in an order
that the operator knows, some of them None. A file of this folder holds one operator: the sweep over slabs,
these two functions, and what users call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effseg import algorithms
from effseg.algorithms.interface import Algorithm
from effseg.common.once import making_once
from effseg.common.settings import Function
from effseg.operators.backward import once_differentiable
from effseg.operators.encoding import decode, encode
from effseg.operators.opaque import fake_gradients, gradients, registered, spread
from effseg.operators.ownership import is_alone

Tensors = Sequence[Tensor | None]
Forward = Callable[[Algorithm, Any, Any], tuple[Sequence[Tensor], Sequence[Tensor]]]
Backward = Callable[..., Tensors]


class Operator:
    """An operator under the name effseg::`name`.

    static: the class of what is no tensor; fake: (ops, static, tensors) -> empty tensors like outputs and
    what backward needs besides, without which there is no operator for torch.compile; outputs: how many, or a
    function of static; constants: which of them have no gradient; own: (outputs, besides) -> what backward
    sees of them, by default `besides`; zeros: whether the gradient of an output that nothing read is 0
    instead of None; reuses: whether backward also gets `alone`, whether the first output's gradient is nobody
    else's, so that it may be overwritten; backward None: nothing is differentiated.

    Saved for backward: the tensors, and `own`.
    """

    def __init__(
        self,
        name: str,
        static: Callable[..., Any],
        forward: Forward,
        backward: Backward | None,
        fake: Callable[[Algorithm, Any, Any], Sequence[Tensor]] | None = None,
        outputs: int | Callable[[Any], int] = 1,
        constants: Sequence[int] = (),
        own: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensors] | None = None,
        zeros: bool = False,
        reuses: bool = False,
    ) -> None:
        self._static, self._forward = static, making_once()(forward)
        self._backward = None if backward is None else making_once()(backward)
        self._outputs, self._constants, self._zeros = outputs, constants, zeros
        self._reuses = reuses
        self._own = own or (lambda _, besides: besides)
        self._node = self._as_node(name) if backward is not None else None
        self._opaque: Any = None if fake is None else self._as_opaque(name, fake)

    def __call__(
        self, device: torch.device, dtype: torch.dtype, static: Any, tensors: Tensors
    ) -> Sequence[Tensor]:
        """The outputs, computed in the algorithm for this device and type."""
        algorithm = algorithms.choose(device, dtype)
        if torch.compiler.is_compiling():
            there = tuple([t is not None for t in tensors])
            text, numbers = encode(algorithm, there, *static)
            given = [t for t in tensors if t is not None]  # autograd does not see into lists with None
            found = self._opaque(text, numbers, given)[: self._count(static)]
            return [t.detach() if i in self._constants else t for i, t in enumerate(found)]
        with torch.autocast(device.type, enabled=False):
            if self._node is not None:
                return self._node.apply(algorithm, device.type, static, *tensors)
            with torch.no_grad():
                return self._forward(algorithms.load(algorithm), static, tensors)[0]

    def _count(self, static: Any) -> int:
        return self._outputs if isinstance(self._outputs, int) else self._outputs(static)

    def _as_node(self, name: str) -> Any:
        """Blind to an autocast that happens to be on in backward: the types are those of forward."""

        def forward(ctx: Any, algorithm: str, device: str, static: Any, *tensors: Any) -> tuple[Tensor, ...]:
            ctx.algorithm, ctx.device_type, ctx.static = algorithm, device, static
            ctx.set_materialize_grads(self._zeros)
            outputs, besides = self._forward(algorithms.load(algorithm), static, tensors)
            own = self._own(outputs, besides)
            ctx.owns = len(own)
            ctx.save_for_backward(*own, *tensors)
            ctx.mark_non_differentiable(*(outputs[i] for i in self._constants if i < len(outputs)))
            return tuple(outputs)

        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            extra = {"alone": is_alone(grads[0])} if self._reuses else {}
            saved, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
            own, tensors = saved[: ctx.owns], saved[ctx.owns :]
            assert self._backward is not None
            with torch.autocast(ctx.device_type, enabled=False):
                ops = algorithms.load(ctx.algorithm)
                found = self._backward(ops, ctx.static, own, tensors, needed, grads, **extra)
            return None, None, None, *found

        title = "".join(part.title() for part in name.split("_"))
        return type(
            f"{title}Function", (Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(backward)},
        )  # fmt: skip

    def _as_opaque(self, name: str, fake: Callable[[Algorithm, Any, Any], Sequence[Tensor]]) -> Any:
        """Dynamo cannot trace loops over slabs, and should not: a trace would unroll them."""

        def forward(text: str, numbers: Sequence[int], given: Sequence[Tensor]) -> list[Tensor]:
            ops, there, static = self._decoded(text, numbers)
            outputs, besides = self._forward(ops, static, spread(given, there))
            return [*outputs, *besides]

        def fakes(text: str, numbers: Sequence[int], given: Sequence[Tensor]) -> list[Tensor]:
            ops, there, static = self._decoded(text, numbers)
            return list(fake(ops, static, spread(given, there)))

        schema = f"{name}(str text, SymInt[] numbers, Tensor[] tensors) -> Tensor[]"
        opaque = registered(schema, forward, fakes)
        if self._backward is not None:
            self._differentiated(name, opaque)
        return getattr(torch.ops.effseg, name).default

    def _decoded(self, text: str, numbers: Sequence[int]) -> tuple[Algorithm, Sequence[bool], Any]:
        """The algorithm, which tensors are there, and what is no tensor."""
        algorithm, there, *static = decode(text, numbers)
        return algorithms.load(algorithm), there, self._static(*static)

    def _differentiated(self, name: str, opaque: Any) -> None:
        def backward(
            text: str, numbers: Sequence[int], needed: Sequence[bool], saved: Any, grads: Any
        ) -> list[Tensor]:
            assert self._backward is not None
            ops, _, static = self._decoded(text, numbers)
            owns = len(saved) - len(needed)
            own, tensors = saved[:owns], saved[owns:]
            found = self._backward(ops, static, own, tensors, needed, grads)
            return gradients(found, tensors, needed, (*saved, *grads))

        pull = registered(
            f"{name}_backward(str text, SymInt[] numbers, bool[] needed, Tensor?[] saved, Tensor?[] grads) "
            "-> Tensor[]",
            backward,
            lambda text, numbers, needed, saved, grads: fake_gradients(saved[-len(needed) :], needed),
        )

        def setup(ctx: Any, inputs: Any, output: Sequence[Tensor]) -> None:
            ctx.text, ctx.numbers, given = inputs
            ctx.set_materialize_grads(self._zeros)
            _, ctx.there, static = self._decoded(ctx.text, ctx.numbers)
            ctx.outputs = self._count(static)
            own = self._own(output[: ctx.outputs], output[ctx.outputs :])
            ctx.save_for_backward(*own, *spread(given, ctx.there))

        def pulled(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
            needed = [bool(need) for need in spread(ctx.needs_input_grad[2], ctx.there)]
            saved, wanted = list(ctx.saved_tensors), list(grads[: ctx.outputs])
            found = spread(pull(ctx.text, ctx.numbers, needed, saved, wanted), needed)
            return None, None, [g for g, is_there in zip(found, ctx.there, strict=True) if is_there]

        opaque.register_autograd(pulled, setup_context=setup)
