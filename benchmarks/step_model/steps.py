"""Which steps are modelled, and by which routes."""

ROUTES = {
    "triton": "every operator by this package's kernels",
    "mixed": "convolutions by cuDNN, everything else by this package's kernels",
    "aten": "every operator by ATen, convolutions by cuDNN: a GPU that was not tuned",
}
STEPS = {
    "base raw": "effseg-base/raw",
    "base stream": "effseg-base/stream",
    "PlainConvUNet raw": "nnunet/raw",
    "PlainConvUNet stream": "nnunet/stream",
}
"""Networks with 15 classes, in bf16, by the name of their contender without an algorithm."""
