"""The ATen algorithm: operations on slabs, each a few ATen calls (oneDNN on CPU, cuDNN on CUDA).

It is complete on both devices and is the reference for kernels. A slab of the activated tensor is made,
used and dropped; only raw outputs outlive a sweep.
"""
