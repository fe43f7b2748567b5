"""The segmentation head's device code: logits of a tile of voxels, what is summed over them, its gradients.

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

from effseg.kernels.common import kernel

# Softmax takes logits in units of ln 2: exp2 is one instruction.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Finite, so that it may be multiplied by a weight of 0.
NO_CLASS = tl.constexpr(-1e30)
NOT_COUNTED = tl.constexpr(1 << 30)


@triton.jit
def _by_voxel(x, CLASS_AXIS: tl.constexpr):
    """(BLOCK_V,) as it is broadcast against logits."""
    return tl.expand_dims(x, CLASS_AXIS)


@triton.jit
def _by_class(x, CLASS_AXIS: tl.constexpr):
    """(BLOCK_K,) as it is broadcast against logits."""
    return tl.expand_dims(x, 1 - CLASS_AXIS)


@triton.jit
def _zeros(CLASS_AXIS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the shape of a tile's logits."""
    if CLASS_AXIS == 1:
        return tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    else:
        return tl.zeros((BLOCK_K, BLOCK_V), tl.float32)


@triton.jit
def _parameters(features_ptr, weight_ptr, bias_ptr, C, K, UNIT, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """weight (BLOCK_C, BLOCK_K) in the features' type, and UNIT * bias (BLOCK_K,)."""
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
def _addresses(tile, voxels, C, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a tile's features start (int64), their offsets from there, and which of them exist."""
    row = tl.arange(0, BLOCK_V)
    c = tl.arange(0, BLOCK_C)
    start = (tl.zeros((), tl.int64) + tile) * BLOCK_V * C
    inside = (row < voxels - tile * BLOCK_V)[:, None] & (c < C)[None, :]
    return start, row[:, None] * C + c[None, :], inside


@triton.jit
def _logits(a, weight_ptr, weight, bias, UNIT, CLASS_AXIS: tl.constexpr, PRECISION: tl.constexpr):
    """UNIT * (weight @ a + bias); NO_CLASS beyond K."""
    if weight_ptr is None:
        z = a.to(tl.float32) if CLASS_AXIS == 1 else tl.trans(a.to(tl.float32))
    elif CLASS_AXIS == 1:
        z = tl.dot(a, weight, input_precision=PRECISION)
    else:
        z = tl.dot(tl.trans(weight), tl.trans(a), input_precision=PRECISION)
    return z * UNIT + _by_class(bias, CLASS_AXIS)


@triton.jit
def _targets(labels_ptr, tile, voxels, K, IGNORE: tl.constexpr, BLOCK_V: tl.constexpr):
    """(BLOCK_V,) each: a tile's classes, int32, none of them where a voxel counts for nothing; whether it
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


@triton.jit
def _add_to_memory(high_ptr, low_ptr, value):
    """Add to high + low, which stay in memory: a row for all classes would take many of a thread's registers.

    low keeps the rounding errors of the sums (Knuth's TwoSum)."""
    high = tl.load(high_ptr)
    total = high + value
    added = total - high
    tl.store(high_ptr, total)
    tl.store(low_ptr, tl.load(low_ptr) + ((high - (total - added)) + (value - added)))


@kernel
def _head_sums_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    class_weights_ptr,
    sums_ptr,
    counts_ptr,
    voxels,
    C: tl.constexpr,
    K: tl.constexpr,
    IGNORE: tl.constexpr,
    CHUNK: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row of partial sums a program.

    sums_ptr: (programs, 2, 2 BLOCK_K + 2) float32: intersection, probability, nll, smooth_nll, and again what
        is to be added to them
    counts_ptr: (programs, BLOCK_K + 1) int32: voxels, unknown

    A position of the tile adds up CHUNK tiles in float32; their total over the voxels goes to the program's
    sums, which carry their rounding errors along. So the relative error of a sum of positive terms is at most
    that of CHUNK - 1 additions and a tree over BLOCK_V values, however many voxels there are.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    k = tl.arange(0, BLOCK_K)
    weight, bias = _parameters(features_ptr, weight_ptr, bias_ptr, C, K, LOG2_E, BLOCK_C, BLOCK_K)
    class_weights = tl.load(class_weights_ptr + k, mask=k < K, other=0.0)
    all_weights = tl.sum(class_weights, 0)

    high_ptr = sums_ptr + program * 2 * (2 * BLOCK_K + 2)
    low_ptr = high_ptr + (2 * BLOCK_K + 2)
    tl.store(high_ptr + k, tl.zeros((BLOCK_K,), tl.float32))
    tl.store(high_ptr + BLOCK_K + k, tl.zeros((BLOCK_K,), tl.float32))
    tl.store(high_ptr + 2 * BLOCK_K + tl.arange(0, 2), tl.zeros((2,), tl.float32))
    tl.store(low_ptr + k, tl.zeros((BLOCK_K,), tl.float32))
    tl.store(low_ptr + BLOCK_K + k, tl.zeros((BLOCK_K,), tl.float32))
    tl.store(low_ptr + 2 * BLOCK_K + tl.arange(0, 2), tl.zeros((2,), tl.float32))
    zeros = _zeros(CLASS_AXIS, BLOCK_V, BLOCK_K)
    count = zeros
    unknown_count = tl.zeros((BLOCK_V,), tl.int32)

    tiles = tl.cdiv(voxels, BLOCK_V)
    for first in range(program, tiles, CHUNK * programs):
        chunk_intersection = zeros
        chunk_probability = zeros
        chunk_nll = tl.zeros((BLOCK_V,), tl.float32)
        chunk_smooth = tl.zeros((BLOCK_V,), tl.float32)
        for tile in range(first, min(first + CHUNK * programs, tiles), programs):
            start, offsets, inside = _addresses(tile, voxels, C, BLOCK_V, BLOCK_C)
            a = tl.load(features_ptr + start + offsets, mask=inside, other=0.0)
            target, counts, unknown = _targets(labels_ptr, tile, voxels, K, IGNORE, BLOCK_V)
            z = _logits(a, weight_ptr, weight, bias, LOG2_E, CLASS_AXIS, PRECISION)
            centred = z - _by_voxel(tl.max(z, CLASS_AXIS), CLASS_AXIS)
            e = tl.exp2(centred)
            total = tl.sum(e, CLASS_AXIS)
            # Never (a sum of exponentials), but this ties the counts to the layout of the logits: without it
            # they are kept in another one, where all comparisons are made a second time.
            target |= tl.where(total < 0, NOT_COUNTED, 0)
            p = e * _by_voxel(tl.where(counts, 1.0 / total, 0.0), CLASS_AXIS)
            is_target = _by_voxel(target, CLASS_AXIS) == _by_class(k, CLASS_AXIS)
            at_target = tl.sum(tl.where(is_target, centred, 0.0), CLASS_AXIS)
            weighted = tl.sum(centred * _by_class(class_weights, CLASS_AXIS), CLASS_AXIS)
            log_total = tl.log2(total)
            target_weight = tl.load(class_weights_ptr + target, mask=counts, other=0.0)
            chunk_nll += target_weight * (log_total - at_target)
            chunk_smooth += tl.where(counts, all_weights * log_total - weighted, 0.0)
            one_hot = is_target.to(tl.float32)
            chunk_probability += p
            chunk_intersection += p * one_hot
            count += one_hot
            unknown_count += unknown.to(tl.int32)
        tl.debug_barrier()  # the row's last stores may be other threads'
        _add_to_memory(high_ptr + k, low_ptr + k, tl.sum(chunk_intersection, 1 - CLASS_AXIS))
        _add_to_memory(
            high_ptr + BLOCK_K + k, low_ptr + BLOCK_K + k, tl.sum(chunk_probability, 1 - CLASS_AXIS)
        )
        _add_to_memory(high_ptr + 2 * BLOCK_K, low_ptr + 2 * BLOCK_K, tl.sum(chunk_nll, 0) * LN_2)
        _add_to_memory(high_ptr + 2 * BLOCK_K + 1, low_ptr + 2 * BLOCK_K + 1, tl.sum(chunk_smooth, 0) * LN_2)

    row_ptr = counts_ptr + program * (BLOCK_K + 1)
    tl.store(row_ptr + k, tl.sum(count.to(tl.int32), 1 - CLASS_AXIS))
    tl.store(row_ptr + BLOCK_K, tl.sum(unknown_count, 0))


@kernel
def _head_backward_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    class_weights_ptr,
    grad_intersection_ptr,
    grad_probability_ptr,
    grad_nll_ptr,
    grad_smooth_ptr,
    out_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    voxels,
    C: tl.constexpr,
    K: tl.constexpr,
    IGNORE: tl.constexpr,
    CHUNK: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """With u_k = g_probability_k + g_intersection_k [label = k], c = g_nll w_label and s = g_smooth:
    dL/dlogit_k = p_k (u_k - sum_j p_j u_j + c + s sum_j w_j) - c [label = k] - s w_k, and 0 for voxels that
    count for nothing.

    grad_intersection_ptr, grad_probability_ptr: (K,); grad_nll_ptr, grad_smooth_ptr: (1,); any float type
    out_ptr: (voxels, C), the features' type, dL/dlogits (in that type) @ weight
    grad_weight_ptr: (programs, BLOCK_K, BLOCK_C) float32, partial sums; or None
    grad_bias_ptr: (programs, BLOCK_K) float32, partial sums; or None

    The parameters' gradients are added up CHUNK tiles at a time before they meet the program's.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    k = tl.arange(0, BLOCK_K)
    weight, bias = _parameters(features_ptr, weight_ptr, bias_ptr, C, K, LOG2_E, BLOCK_C, BLOCK_K)
    g_nll = tl.load(grad_nll_ptr).to(tl.float32)
    g_smooth = tl.load(grad_smooth_ptr).to(tl.float32)
    all_weights = tl.sum(tl.load(class_weights_ptr + k, mask=k < K, other=0.0), 0)

    weight_row = program * BLOCK_K * BLOCK_C + k[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    bias_row = program * BLOCK_K + k
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + weight_row, tl.zeros((BLOCK_K, BLOCK_C), tl.float32))
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + bias_row, tl.zeros((BLOCK_K,), tl.float32))

    tiles = tl.cdiv(voxels, BLOCK_V)
    for first in range(program, tiles, CHUNK * programs):
        if grad_weight_ptr is not None:
            chunk_weight = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        if grad_bias_ptr is not None:
            chunk_bias = _zeros(CLASS_AXIS, BLOCK_V, BLOCK_K)
        for tile in range(first, min(first + CHUNK * programs, tiles), programs):
            start, offsets, inside = _addresses(tile, voxels, C, BLOCK_V, BLOCK_C)
            a = tl.load(features_ptr + start + offsets, mask=inside, other=0.0)
            target, counts, _ = _targets(labels_ptr, tile, voxels, K, IGNORE, BLOCK_V)
            z = _logits(a, weight_ptr, weight, bias, LOG2_E, CLASS_AXIS, PRECISION)
            e = tl.exp2(z - _by_voxel(tl.max(z, CLASS_AXIS), CLASS_AXIS))
            p = e * _by_voxel(tl.where(counts, 1.0 / tl.sum(e, CLASS_AXIS), 0.0), CLASS_AXIS)
            c = g_nll * tl.load(class_weights_ptr + target, mask=counts, other=0.0)
            one_hot = (_by_voxel(target, CLASS_AXIS) == _by_class(k, CLASS_AXIS)).to(tl.float32)
            # Rows for all classes are read here, from the cache: kept, they would take too many registers.
            g_intersection = tl.load(grad_intersection_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            g_probability = tl.load(grad_probability_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            pu = p * (one_hot * _by_class(g_intersection, CLASS_AXIS) + _by_class(g_probability, CLASS_AXIS))
            g = pu + p * _by_voxel(c + g_smooth * all_weights - tl.sum(pu, CLASS_AXIS), CLASS_AXIS)
            g -= one_hot * _by_voxel(c, CLASS_AXIS)
            class_weights = tl.load(class_weights_ptr + k, mask=k < K, other=0.0)
            g -= _by_voxel(tl.where(counts, g_smooth, 0.0), CLASS_AXIS) * _by_class(class_weights, CLASS_AXIS)
            if grad_bias_ptr is not None:
                chunk_bias += g
            g = g.to(features_ptr.dtype.element_ty)
            if weight_ptr is None:
                grad = g
            elif CLASS_AXIS == 1:
                grad = tl.dot(g, tl.trans(weight), input_precision=PRECISION)
            else:
                grad = tl.dot(weight, g, input_precision=PRECISION)
            if CLASS_AXIS == 0:
                grad = tl.trans(grad)
            tl.store(out_ptr + start + offsets, grad.to(out_ptr.dtype.element_ty), mask=inside)
            if grad_weight_ptr is not None:
                by_class = tl.trans(g) if CLASS_AXIS == 1 else g
                chunk_weight = tl.dot(by_class, a, chunk_weight, input_precision=PRECISION)
        tl.debug_barrier()  # the row's last stores may be other threads'
        if grad_weight_ptr is not None:
            tl.store(grad_weight_ptr + weight_row, tl.load(grad_weight_ptr + weight_row) + chunk_weight)
        if grad_bias_ptr is not None:
            tl.store(
                grad_bias_ptr + bias_row,
                tl.load(grad_bias_ptr + bias_row) + tl.sum(chunk_bias, 1 - CLASS_AXIS),
            )


@kernel
def _head_argmax_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    voxels,
    C: tl.constexpr,
    K: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_ptr: (voxels,), any integer type: the lowest class of the largest logit; NaN counts as inf."""
    weight, bias = _parameters(features_ptr, weight_ptr, bias_ptr, C, K, 1.0, BLOCK_C, BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    row = tl.arange(0, BLOCK_V)
    for tile in range(tl.program_id(0), tl.cdiv(voxels, BLOCK_V), tl.num_programs(0)):
        start, offsets, inside = _addresses(tile, voxels, C, BLOCK_V, BLOCK_C)
        a = tl.load(features_ptr + start + offsets, mask=inside, other=0.0)
        z = _logits(a, weight_ptr, weight, bias, 1.0, CLASS_AXIS, PRECISION)
        z = tl.where(z == z, z, float("inf"))
        z = tl.where(_by_class(k < K, CLASS_AXIS), z, -float("inf"))
        found = tl.argmax(z, CLASS_AXIS).to(out_ptr.dtype.element_ty)
        first = (tl.zeros((), tl.int64) + tile) * BLOCK_V
        tl.store(out_ptr + first + row, found, mask=row < voxels - tile * BLOCK_V)
