"""Triton's CPU interpreter, mended: what it gets wrong about bfloat16.

Its dot multiplies the bits of bfloat16 numbers, and its conversion from float32 truncates.
"""

import numpy as np


def mend() -> None:
    """Raises RuntimeError where kernels were imported before they were asked to be interpreted."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    if not isinstance(tl.cdiv, InterpretedFunction):
        raise RuntimeError("triton.language was imported before TRITON_INTERPRET=1 was set")

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def to_nearest(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = source.data.view(np.uint32).astype(np.uint64)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return TensorHandle(rounded, tl.bfloat16)
        return cast(self, source, target)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = to_nearest
    InterpreterBuilder.create_fp_trunc = to_nearest
