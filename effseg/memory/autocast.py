"""CUDA's autocast rules, for tensors that only pretend to be somewhere.

Fake tensors live on the CPU here, and the CPU's autocast has other lists (its softmax and group norm stay
in bfloat16), so a prediction for a GPU must apply the GPU's rules by hand.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior: the entries that a segmentation
# network or its loss can meet.
# fmt: off
LOW_PRECISION = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
    "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "chain_matmul", "prelu",
    "scaled_dot_product_attention", "einsum", "tensordot", "inner", "multi_dot",
    "multi_head_attention_forward",  # the last five are made of others that are on CUDA's list
})
FULL_PRECISION = frozenset({
    "softmax", "log_softmax", "group_norm", "layer_norm", "nll_loss", "cross_entropy", "cross_entropy_loss",
    "binary_cross_entropy_with_logits", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
    "exp", "expm1", "log", "log1p", "log2", "log10", "pow", "__pow__", "rsqrt", "reciprocal", "cumsum",
    "cumprod", "prod", "norm", "cosine_similarity", "softplus",
})
# fmt: on


class CudaAutocast(TorchFunctionMode):
    """While active, torch functions cast their arguments as under ``torch.autocast("cuda", dtype)``.

    switched: only where torch.autocast("cpu") is on, for networks whose own operators ask it, and which turn
    it off within those; C++ casts no tensor of `QuickFakes`, which it takes for one of another device.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *, switched: bool = False) -> None:
        super().__init__()
        self._dtype, self._switched = dtype, switched
        self._weights: dict[int, torch.Tensor] = {}

    def forget(self) -> None:
        """Drop the cast weights, as leaving torch.autocast does; the graph keeps those that it needs."""
        self._weights.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._switched and not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        for kind in types if torch._C._is_torch_function_enabled() else ():
            if kind.__torch_function__ is not torch._C._disabled_torch_function_impl:
                with self:  # it may call torch for ordinary tensors
                    return kind.__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in LOW_PRECISION:
            args, kwargs = tree_map(self._lower, (args, kwargs))
            return func(*args, **kwargs)
        if name in FULL_PRECISION:
            return func(*map(_raise, args), **{key: _raise(value) for key, value in kwargs.items()})
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self._dtype)
        if id(value) not in self._weights:  # autocast casts a weight once, however often it is used
            self._weights[id(value)] = value.to(self._dtype)
        return self._weights[id(value)]


def _raise(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value
