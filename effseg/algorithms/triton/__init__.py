"""The Triton algorithm: our kernels (`effseg.kernels`) as operations on slabs, and convolutions that make the
activated input as they read it. On CUDA; elsewhere in Triton's interpreter (TRITON_INTERPRET=1)."""
