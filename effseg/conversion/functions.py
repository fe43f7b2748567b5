"""Torch's functions, by what they need of a lazy tensor."""

from __future__ import annotations

from types import FrameType

import torch
from torch import Tensor
from torch.utils import checkpoint

DEVICE = vars(torch._C.TensorBase)["device"].__get__
METADATA = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_quantized",
        "is_mkldnn", "is_meta", "is_nested", "itemsize", "nbytes", "requires_grad",
    )),
    *(getattr(Tensor, name) for name in (
        "dim", "size", "numel", "nelement", "is_floating_point", "is_complex", "element_size", "__len__",
        "__hash__", "stride", "is_contiguous", "storage_offset",
    )),
    torch.numel, torch.is_floating_point, torch.is_complex,
}  # fmt: skip

VIEWS = (
    "as_strided", "permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "chunk", "split",
    "tensor_split", "narrow", "unsqueeze", "squeeze", "unflatten", "flatten", "ravel", "reshape", "unbind",
    "select", "diagonal", "detach",
)  # fmt: skip
LAID_OUT = {
    *(getattr(Tensor, name) for name in (
        *VIEWS, "view", "view_as", "reshape_as", "unfold", "expand", "expand_as", "data_ptr", "numpy",
        "__array__", "untyped_storage", "storage", "__getitem__",
    )),
    *(getattr(torch, name) for name in VIEWS),
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("data", "T", "mT")),
}  # fmt: skip
"""Functions whose answer, or whether there is one, depends on how memory is laid out; those that give views
fix it."""

ORDINARY = {vars(torch._C.TensorBase)["grad"].__get__, torch.autograd.grad}
"""Functions that give gradients, which stay ordinary tensors."""

HOOKS = {Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook}

ALIASES = {
    torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.view.default,
    torch.ops.aten.view_as.default,
}  # fmt: skip


def asked_by_checkpoint(frame: FrameType | None) -> bool:
    """Whether torch.utils.checkpoint asks, which looks at every argument before it notes them down: they are
    stored first, so that the second pass finds what the first one found."""
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame is not None and frame.f_globals is vars(checkpoint)
