"""Multiply-accumulates of the operators that have nearly all of them: convolutions and matrix products."""

from typing import Any

import torch

aten = torch.ops.aten


def multiply_accumulates(func: Any, args: Any, out: Any) -> int:
    """Of one call of an ATen operator that returned `out`; 0 for others than convolutions and products."""
    if func is aten.convolution.default:
        x, weight, transposed = args[0], args[1], args[6]
        return (x if transposed else out).numel() * weight[0].numel()
    if func is aten.convolution_backward.default:
        grad, x, weight, transposed = args[0], args[1], args[2], args[7]
        need_input, need_weight, _ = args[10]
        return (need_input + need_weight) * (x if transposed else grad).numel() * weight[0].numel()
    if func in (aten.mm.default, aten.bmm.default):
        return out.numel() * args[0].shape[-1]
    return out.numel() * args[1].shape[-1] if func is aten.addmm.default else 0
