"""`python with_nnunet.py COMMAND ...`: `effseg COMMAND ...` where nnU-Net is beside a torch without CUDA.

PyPI's torchvision is built for CUDA and cannot be imported beside torch without it, and nnU-Net's look-up of
trainers imports it. It needs no more than the schemas of two operators. Not under the guard below: nnU-Net's
worker processes import this file again.
"""

import sys

import torch

if not torch.cuda.is_available():
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if __name__ == "__main__":
    from effseg.cli import main

    sys.exit(main())
