"""Multiply-accumulates of the operators that have nearly all of them: convolutions and matrix products."""

from typing import Any

import torch

aten = torch.ops.aten
COUNTED = frozenset({
    aten.addmm.default, aten.bmm.default, aten.convolution.default, aten.convolution_backward.default,
    aten.mm.default,
})  # fmt: skip


def multiply_accumulates(func: Any, args: Any, out: Any) -> int:
    """Of one call of an ATen operator that returned `out`; 0 for others than convolutions and products."""
    if func not in COUNTED:
        return 0
    if func is aten.convolution.default:
        x, weight, transposed = args[0], args[1], args[6]
        return (x if transposed else out).numel() * weight[0].numel()
    if func is aten.convolution_backward.default:
        grad, x, weight, transposed = args[0], args[1], args[2], args[7]
        need_input, need_weight, _ = args[10]
        return (need_input + need_weight) * (x if transposed else grad).numel() * weight[0].numel()
    left: torch.Tensor = args[1] if func is aten.addmm.default else args[0]
    return out.numel() * left.shape[-1]
