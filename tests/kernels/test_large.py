"""Tensors of more than 2^31 elements, for real: the last planes are those of a small volume."""

import pytest
import torch

import effseg
from effseg import functional
from effseg.functional import Normalisation

# 16 x 560 x 512 x 512 elements are 2.35e9.
ROWS, TAIL = 560, 4


@pytest.mark.gpu
@pytest.mark.parametrize("out_channels", [16, 32])
def test_a_convolution_past_2_to_the_31(out_channels):
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    y = torch.empty(1, 16, ROWS, 512, 512, dtype=dtype, device=device, memory_format=torch.channels_last_3d)
    y.normal_()
    terms = [torch.rand(1, 16, device=device) + 0.5 for _ in range(3)]
    weight = torch.randn(out_channels, 16, 3, 3, 3, device=device, dtype=dtype) * 0.05
    tail = y[:, :, -TAIL - 1 :].clone()

    def run(x, grad_rows):
        x = x.detach().requires_grad_()
        with effseg.algorithm("triton"):
            out, _, _ = functional.conv3d(
                functional.raw(x, Normalisation(*terms), 0.01), weight, statistics=False
            )
            grad = torch.zeros_like(out)
            grad[:, :, -grad_rows:] = 1
            (grad_x,) = torch.autograd.grad(out, [x], grad)
        return out[:, :, -TAIL:].clone(), grad_x[:, :, -TAIL:].clone()

    for whole, part in zip(run(y, TAIL), run(tail, TAIL), strict=True):
        assert torch.equal(whole, part)
