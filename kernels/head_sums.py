"""The segmentation head's sums: what Dice and cross-entropy need of softmax and labels."""

import triton
import triton.language as tl

from effseg.kernels.common import kernel
from effseg.kernels.head_loops import (
    LN_2,
    LOG2_E,
    NOT_COUNTED,
    addresses_of,
    by_class,
    by_voxel,
    logits_of,
    no_logits,
    parameters_of,
    targets_of,
)


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
    features_ptr,  # [voxels, C]
    weight_ptr,  # [K, C]
    bias_ptr,  # [K]
    labels_ptr,  # [voxels]
    class_weights_ptr,  # [K]
    sums_ptr,  # [programs, 2, 2 BLOCK_K + 2] float32
    counts_ptr,  # [programs, BLOCK_K + 1] int32
    voxels,
    C: tl.constexpr, K: tl.constexpr, IGNORE: tl.constexpr, CHUNK: tl.constexpr,
    CLASS_AXIS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One row of partial sums a program.

    sums_ptr: intersection, probability, nll, smooth_nll, and again what is to be added to them
    counts_ptr: voxels, unknown

    A position of the tile adds up CHUNK tiles in float32; their total over the voxels goes to the program's
    sums, which carry their rounding errors along. So the relative error of a sum of positive terms is at most
    that of CHUNK - 1 additions and a tree over BLOCK_V values, however many voxels there are.
    """
    # For every tile of voxels v whose label y_v counts, with p = softmax(z):
    #   intersection_k += sum of p_vk [y_v = k];   probability_k += sum of p_vk;   count_k += sum of [y_v = k]
    #   nll += sum over v of w_{y_v} (-log p_{v, y_v});   smooth_nll += sum over v, k of w_k (-log p_vk)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    k = tl.arange(0, BLOCK_K)
    weight, bias = parameters_of(features_ptr, weight_ptr, bias_ptr, C, K, LOG2_E, BLOCK_C, BLOCK_K)
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
    zeros = no_logits(CLASS_AXIS, BLOCK_V, BLOCK_K)
    count = zeros
    unknown_count = tl.zeros((BLOCK_V,), tl.int32)

    tiles = tl.cdiv(voxels, BLOCK_V)
    for first in range(program, tiles, CHUNK * programs):
        chunk_intersection = zeros
        chunk_probability = zeros
        chunk_nll = tl.zeros((BLOCK_V,), tl.float32)
        chunk_smooth = tl.zeros((BLOCK_V,), tl.float32)
        for tile in range(first, min(first + CHUNK * programs, tiles), programs):
            start, offsets, inside = addresses_of(tile, voxels, C, BLOCK_V, BLOCK_C)
            a = tl.load(features_ptr + start + offsets, mask=inside, other=0.0)
            target, counts, unknown = targets_of(labels_ptr, tile, voxels, K, IGNORE, BLOCK_V)
            z = logits_of(a, weight_ptr, weight, bias, LOG2_E, CLASS_AXIS, PRECISION)
            centred = z - by_voxel(tl.max(z, CLASS_AXIS), CLASS_AXIS)
            e = tl.exp2(centred)
            total = tl.sum(e, CLASS_AXIS)
            # Never (a sum of exponentials), but this ties the counts to the layout of the logits: without it
            # they are kept in another one, where all comparisons are made a second time.
            target |= tl.where(total < 0, NOT_COUNTED, 0)
            p = e * by_voxel(tl.where(counts, 1.0 / total, 0.0), CLASS_AXIS)
            is_target = by_voxel(target, CLASS_AXIS) == by_class(k, CLASS_AXIS)
            at_target = tl.sum(tl.where(is_target, centred, 0.0), CLASS_AXIS)
            weighted = tl.sum(centred * by_class(class_weights, CLASS_AXIS), CLASS_AXIS)
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
