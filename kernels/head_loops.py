"""What the segmentation head's kernels share: the logits z[v, k] = sum over c of a[v, c] w[k, c] + b[k] of a
tile of voxels, and its labels.

A tile is BLOCK_V consecutive voxels of a slab whose features lie as a (voxels, C) matrix. Program p of P
works on tiles p, p + P, p + 2 P, ...: which voxels meet in which sum depends on P alone. Common arguments:

    features_ptr  (voxels, C), fp32, bf16 or fp16; logits, C = K, if there is no weight_ptr
    weight_ptr    (K, C), any float type, rounded to the features' for the product; or None
    bias_ptr      (K,), any float type; or None
    labels_ptr    (voxels,), any integer type
    class_weights_ptr  (K,) float32

C and K are padded to BLOCK_C and BLOCK_K, powers of two of at least 16: with zeros, and with logits that are
so low that their probability is 0. Everything but the operands of products is float32.

CLASS_AXIS is how a tile's logits lie: 1 as (BLOCK_V, BLOCK_K), for few classes; 0 as (BLOCK_K, BLOCK_V),
which spreads many classes over the warps, so that a thread has few of them to keep numbers for.
"""

import triton
import triton.language as tl

# Softmax takes logits in units of ln 2: exp2 is one instruction.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Finite, so that it may be multiplied by a weight of 0.
NO_CLASS = tl.constexpr(-1e30)
NOT_COUNTED = tl.constexpr(1 << 30)


@triton.jit
def by_voxel(x, CLASS_AXIS: tl.constexpr):
    """[BLOCK_V] as it is broadcast against logits."""
    return tl.expand_dims(x, CLASS_AXIS)


@triton.jit
def by_class(x, CLASS_AXIS: tl.constexpr):
    """[BLOCK_K] as it is broadcast against logits."""
    return tl.expand_dims(x, 1 - CLASS_AXIS)


@triton.jit
def no_logits(CLASS_AXIS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the shape of a tile's logits."""
    if CLASS_AXIS == 1:
        return tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    else:
        return tl.zeros((BLOCK_K, BLOCK_V), tl.float32)


@triton.jit
def parameters_of(
    features_ptr,  # [voxels, C]
    weight_ptr,  # [K, C]
    bias_ptr,  # [K]
    C, K, UNIT,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weight [BLOCK_C, BLOCK_K] in the features' type, and UNIT * bias [BLOCK_K]."""
    c = tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    weight = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    bias = tl.zeros((BLOCK_K,), tl.float32)
    if weight_ptr is not None:
        inside = (c < C)[:, None] & (k < K)[None, :]
        weight = tl.load(weight_ptr + k[None, :] * C + c[:, None], mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32) * UNIT
    return weight.to(features_ptr.dtype.element_ty), tl.where(k < K, bias, NO_CLASS)


@triton.jit
def addresses_of(tile, voxels, C, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a tile's features start (int64), their offsets from there, and which of them exist."""
    row = tl.arange(0, BLOCK_V)
    c = tl.arange(0, BLOCK_C)
    start = (tl.zeros((), tl.int64) + tile) * BLOCK_V * C
    inside = (row < voxels - tile * BLOCK_V)[:, None] & (c < C)[None, :]
    return start, row[:, None] * C + c[None, :], inside


@triton.jit
def logits_of(
    a,  # [BLOCK_V, BLOCK_C]
    weight_ptr,
    weight,  # [BLOCK_C, BLOCK_K]
    bias,  # [BLOCK_K]
    UNIT, CLASS_AXIS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """UNIT * (weight @ a + bias); NO_CLASS beyond K."""
    if weight_ptr is None:
        z = a.to(tl.float32) if CLASS_AXIS == 1 else tl.trans(a.to(tl.float32))
    elif CLASS_AXIS == 1:
        z = tl.dot(a, weight, input_precision=PRECISION)
    else:
        z = tl.dot(tl.trans(weight), tl.trans(a), input_precision=PRECISION)
    return z * UNIT + by_class(bias, CLASS_AXIS)


@triton.jit
def targets_of(labels_ptr, tile, voxels, K, IGNORE: tl.constexpr, BLOCK_V: tl.constexpr):
    """[BLOCK_V] each: a tile's classes, int32, none of them where a voxel counts for nothing; whether it
    counts; whether its label is unknown."""
    row = tl.arange(0, BLOCK_V)
    inside = row < voxels - tile * BLOCK_V
    start = (tl.zeros((), tl.int64) + tile) * BLOCK_V
    label = tl.load(labels_ptr + start + row, mask=inside, other=0)
    if labels_ptr.dtype.element_ty.primitive_bitwidth < 32:
        label = label.to(tl.int32)  # a narrow type may not hold K
    unknown = inside & ((label < 0) | (label >= K))
    counts = inside & (label >= 0) & (label < K)
    if IGNORE is not None:
        unknown = unknown & (label != IGNORE)
        counts = counts & (label != IGNORE)
    # An `or`, where a select would be folded into every comparison with a class.
    return label.to(tl.int32) | tl.where(counts, 0, NOT_COUNTED), counts, unknown
