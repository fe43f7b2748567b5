"""What kernels compile to, without a GPU."""
