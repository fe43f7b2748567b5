"""What the weight gradient's two main loops share: `conv3d_wgrad_march` and `conv3d_wgrad_tap`.

Both are gw[kd, kh, kw, ci, co] = sum over n, o of a(x[n, stride o + (kd, kh, kw) - padding, ci]) g[n, o, co],
in float32, and write one partial row a split, whole: a split without work writes zeros. Features are channels
last; samples are x_stride and the like voxels apart. Common arguments:

x_ptr                           (samples, rows, H, W, CI), of any type, converted to grad's as it is read
grad_ptr, y_ptr, out_ptr        (samples, out_rows, out_H, out_W, CO)
scale_ptr, shift_ptr            (samples, CI) float32; PROLOGUE: x stands for leaky_relu(x * scale + shift,
                                SLOPE), zero outside x
fold_scale_ptr, fold_shift_ptr  (samples, CO) float32; FOLD: the gradient is grad + y * scale + shift, rounded
                                to grad's type and written to out_ptr
partial_ptr                     one product [BLOCK_M, BLOCK_N] for each tap that a program has; see the loops
front                           input row = stride * output row + tap - front

BLOCK_V = BLOCK_H * BLOCK_W are the voxels, or pairs of them, over which one product contracts.
"""

import triton
import triton.language as tl


@triton.jit
def within(index, size):
    """0 <= index < size, in one comparison of unsigned numbers."""
    size = (tl.zeros((), tl.int32) + size).to(tl.uint32, bitcast=True)
    return index.to(tl.uint32, bitcast=True) < size


@triton.jit
def plane_size(H, W, C: tl.constexpr):
    """Elements of a row of the volume, 64-bit."""
    return (tl.zeros((), tl.int64) + H) * W * C


@triton.jit
def terms_of(scale_ptr, shift_ptr, n, channel, C: tl.constexpr, USED: tl.constexpr, MASKED: tl.constexpr):
    """(scale, shift) of sample n, [1, channels] each; zeros where channel >= C, and if not USED."""
    if USED:
        offset = n * C + channel
        if MASKED:
            scale = tl.load(scale_ptr + offset, mask=channel < C, other=0.0)
            shift = tl.load(shift_ptr + offset, mask=channel < C, other=0.0)
        else:
            scale = tl.load(scale_ptr + offset)
            shift = tl.load(shift_ptr + offset)
        return scale[None, :], shift[None, :]
    else:
        return 0.0, 0.0


@triton.jit
def folded(
    grad, y,  # [BLOCK_V, BLOCK_N]
    scale, shift,  # [1, BLOCK_N]
):  # fmt: skip
    """grad + y * scale + shift, rounded to grad's type."""
    return (grad.to(tl.float32) + (y.to(tl.float32) * scale + shift)).to(grad.dtype)
