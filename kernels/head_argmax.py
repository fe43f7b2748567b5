"""The segmentation head's classes."""

import triton.language as tl

from effseg.kernels.common import kernel
from effseg.kernels.head_loops import addresses_of, by_class, logits_of, parameters_of


@kernel
def _head_argmax_kernel(
    features_ptr,  # [voxels, C]
    weight_ptr,  # [K, C]
    bias_ptr,  # [K]
    out_ptr,  # [voxels], any integer type
    voxels,
    C: tl.constexpr, K: tl.constexpr, CLASS_AXIS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_v = the lowest k of the largest z_vk; NaN counts as inf."""
    # For every tile of voxels v:
    #   z_vk = sum over c of a_vc w_kc + b_k
    #   out_v = argmax over k of z_vk
    weight, bias = parameters_of(features_ptr, weight_ptr, bias_ptr, C, K, 1.0, BLOCK_C, BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    row = tl.arange(0, BLOCK_V)
    for tile in range(tl.program_id(0), tl.cdiv(voxels, BLOCK_V), tl.num_programs(0)):
        start, offsets, inside = addresses_of(tile, voxels, C, BLOCK_V, BLOCK_C)
        a = tl.load(features_ptr + start + offsets, mask=inside, other=0.0)
        z = logits_of(a, weight_ptr, weight, bias, 1.0, CLASS_AXIS, PRECISION)
        z = tl.where(z == z, z, float("inf"))
        z = tl.where(by_class(k < K, CLASS_AXIS), z, -float("inf"))
        found = tl.argmax(z, CLASS_AXIS).to(out_ptr.dtype.element_ty)
        first = (tl.zeros((), tl.int64) + tile) * BLOCK_V
        tl.store(out_ptr + first + row, found, mask=row < voxels - tile * BLOCK_V)
