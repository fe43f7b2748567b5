"""The gradients of the segmentation head's sums."""

import triton.language as tl

from effseg.kernels.common import kernel
from effseg.kernels.head_loops import (
    LOG2_E,
    addresses_of,
    by_class,
    by_voxel,
    logits_of,
    no_logits,
    parameters_of,
    targets_of,
)


@kernel
def _head_backward_kernel(
    features_ptr,  # [voxels, C]
    weight_ptr,  # [K, C]
    bias_ptr,  # [K]
    labels_ptr,  # [voxels]
    class_weights_ptr,  # [K]
    grad_intersection_ptr, grad_probability_ptr,  # [K], any float type
    grad_nll_ptr, grad_smooth_ptr,  # [1], any float type
    out_ptr,  # [voxels, C], the features' type
    grad_weight_ptr,  # [programs, BLOCK_K, BLOCK_C] float32, partial sums; or None
    grad_bias_ptr,  # [programs, BLOCK_K] float32, partial sums; or None
    voxels,
    C: tl.constexpr, K: tl.constexpr, IGNORE: tl.constexpr, CHUNK: tl.constexpr,
    CLASS_AXIS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of features, weight and bias from those of the sums.

    With u_k = g_probability_k + g_intersection_k [label = k], c = g_nll w_label and s = g_smooth:
    dL/dlogit_k = p_k (u_k - sum_j p_j u_j + c + s sum_j w_j) - c [label = k] - s w_k, and 0 for voxels that
    count for nothing.

    The parameters' gradients are added up CHUNK tiles at a time before they meet the program's.
    """
    # For every tile of voxels v, with g = dL/dlogits [BLOCK_V, BLOCK_K] as above, in the features' type:
    #   out_vc = sum over k of g_vk w_kc
    #   grad_weight_kc += sum over v of g_vk a_vc;   grad_bias_k += sum over v of g_vk
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    k = tl.arange(0, BLOCK_K)
    weight, bias = parameters_of(features_ptr, weight_ptr, bias_ptr, C, K, LOG2_E, BLOCK_C, BLOCK_K)
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
            chunk_bias = no_logits(CLASS_AXIS, BLOCK_V, BLOCK_K)
        for tile in range(first, min(first + CHUNK * programs, tiles), programs):
            start, offsets, inside = addresses_of(tile, voxels, C, BLOCK_V, BLOCK_C)
            a = tl.load(features_ptr + start + offsets, mask=inside, other=0.0)
            target, counts, _ = targets_of(labels_ptr, tile, voxels, K, IGNORE, BLOCK_V)
            z = logits_of(a, weight_ptr, weight, bias, LOG2_E, CLASS_AXIS, PRECISION)
            e = tl.exp2(z - by_voxel(tl.max(z, CLASS_AXIS), CLASS_AXIS))
            p = e * by_voxel(tl.where(counts, 1.0 / tl.sum(e, CLASS_AXIS), 0.0), CLASS_AXIS)
            c = g_nll * tl.load(class_weights_ptr + target, mask=counts, other=0.0)
            one_hot = (by_voxel(target, CLASS_AXIS) == by_class(k, CLASS_AXIS)).to(tl.float32)
            # Rows for all classes are read here, from the cache: kept, they would take too many registers.
            g_intersection = tl.load(grad_intersection_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            g_probability = tl.load(grad_probability_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            pu = p * (one_hot * by_class(g_intersection, CLASS_AXIS) + by_class(g_probability, CLASS_AXIS))
            g = pu + p * by_voxel(c + g_smooth * all_weights - tl.sum(pu, CLASS_AXIS), CLASS_AXIS)
            g -= one_hot * by_voxel(c, CLASS_AXIS)
            class_weights = tl.load(class_weights_ptr + k, mask=k < K, other=0.0)
            g -= by_voxel(tl.where(counts, g_smooth, 0.0), CLASS_AXIS) * by_class(class_weights, CLASS_AXIS)
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
                rows = tl.trans(g) if CLASS_AXIS == 1 else g  # [BLOCK_K, BLOCK_V]
                chunk_weight = tl.dot(rows, a, chunk_weight, input_precision=PRECISION)
        tl.debug_barrier()  # the row's last stores may be other threads'
        if grad_weight_ptr is not None:
            tl.store(grad_weight_ptr + weight_row, tl.load(grad_weight_ptr + weight_row) + chunk_weight)
        if grad_bias_ptr is not None:
            tl.store(
                grad_bias_ptr + bias_row,
                tl.load(grad_bias_ptr + bias_row) + tl.sum(chunk_bias, 1 - CLASS_AXIS),
            )
