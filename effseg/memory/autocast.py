"""CUDA's autocast rules, for tensors that only pretend to be somewhere.

Fake tensors live on the CPU here, and the CPU's autocast has other lists (its softmax and group norm stay
in bfloat16), so a prediction for a GPU must apply the GPU's rules by hand.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# ATen/autocast_mode.h, AT_FORALL_LOWER_PRECISION_FP and those after it, by the names of torch functions: the
# entries that a segmentation network or its loss can meet, and what is made of them.
# fmt: off
LOW_PRECISION = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addmv", "addr", "baddbmm", "addbmm", "mv",
    "chain_matmul", "linalg_multi_dot", "linalg_vecdot", "prelu", "scaled_dot_product_attention", "einsum",
    "multi_head_attention_forward",
})
FULL_PRECISION = frozenset({
    "softmax", "softmin", "special_softmax", "log_softmax", "special_log_softmax", "logsumexp",
    "special_logsumexp", "group_norm", "layer_norm", "rms_norm", "local_response_norm", "normalize", "renorm",
    "nll_loss", "cross_entropy", "cross_entropy_loss", "poisson_nll_loss", "cosine_embedding_loss",
    "margin_ranking_loss", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss", "smooth_l1_loss",
    "huber_loss", "kl_div", "exp", "expm1", "log", "log1p", "log2", "log10", "pow", "__pow__", "__rpow__",
    "square", "rsqrt", "reciprocal", "__rtruediv__", "__rdiv__", "tan", "acos", "asin", "cosh", "sinh",
    "erfinv", "cumsum", "cumprod", "prod", "norm", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm",
    "dist", "cdist", "pairwise_distance", "cosine_similarity", "softplus", "upsample", "upsample_nearest",
    "upsample_bilinear", "interpolate",
})
PROMOTED = frozenset({
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "inner", "tensordot", "grid_sample",
    "scatter_add",
})
"""They take the widest type among their arguments, where torch otherwise refuses several."""
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
        if name in FULL_PRECISION and kwargs.get("mode") != "area":  # which is pooling
            return func(*map(_raise, args), **{key: _raise(value) for key, value in kwargs.items()})
        if name in PROMOTED and any(x.dtype == torch.float32 for x in _tensors((args, kwargs))):
            args, kwargs = tree_map(_raise, (args, kwargs))
        if name == "sum" and kwargs.get("dtype") is None and any(map(_is_low, _tensors(args))):
            kwargs = {**kwargs, "dtype": torch.float32}  # as it reads, not of a copy
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
    return value.float() if isinstance(value, torch.Tensor) and _is_low(value) else value


def _is_low(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
