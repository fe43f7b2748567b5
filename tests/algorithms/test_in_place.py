"""Gradients that come to lie where those that they are made of lay."""

from itertools import product

import pytest
import torch

from effseg import algorithm
from effseg.algorithms import select
from effseg.common.formats import CHANNELS_LAST
from effseg.expressions.base import Normalisation
from effseg.expressions.layers import plain, raw, residual
from effseg.expressions.slabs import Window
from effseg.operators.conv3d import conv3d_backward
from effseg.operators.materialise import materialise_backward

C, SIZE = 4, (5, 3, 2)
SHAPE = (2, C, *SIZE)
ROW = C * SIZE[1] * SIZE[2]


def stored():
    return torch.randn(SHAPE).contiguous(memory_format=CHANNELS_LAST)


def norm():
    return Normalisation(torch.randn(2, C), torch.rand(2, C) + 0.5, torch.randn(2, C))


EXPRESSIONS = {
    "plain": lambda: plain(stored(), torch.float32),
    "raw": lambda: raw(stored(), norm(), 0.1),
    "residual": lambda: residual(raw(stored(), norm(), 0.1), stored(), norm(), 0.1),
}


def operations(name):
    if name == "triton":
        pytest.importorskip("triton")
    with algorithm(name):
        return select(torch.device("cpu"), torch.float32)


@pytest.fixture(params=["aten", "triton"])
def ops(request):
    return operations(request.param)


QUICK = {("triton", "raw", True, 2), ("triton", "plain", False, 3)}  # in the interpreter
EVERY = [
    pytest.param(*case, marks=() if case[0] == "aten" or case in QUICK else pytest.mark.slow)
    for case in product(("aten", "triton"), EXPRESSIONS, (True, False), (1, 2, 3, 100))
]


@pytest.mark.parametrize(("name", "expression", "statistics", "rows"), EVERY)
def test_of_a_convolution(name, expression, statistics, rows):
    torch.manual_seed(0)
    ops = operations(name)
    x, weight, y, grad = EXPRESSIONS[expression](), torch.randn(C, C, 3, 3, 3), stored(), stored()
    folded = [torch.randn(2, C) if statistics else None for _ in range(3)]

    def gradients(grad, **options):
        return conv3d_backward(
            ops, x.spec, x.tensors, [True] * len(x.tensors), weight, Window((3, 3, 3)), y, folded[0], grad,
            *folded[1:], True, False, rows * ROW, **options,
        )  # fmt: skip

    expected = gradients(grad.clone())
    memory = grad.clone()
    got = gradients(memory, consumes=True)
    torch.testing.assert_close(got, expected)
    assert got[2][0].data_ptr() == memory.data_ptr()
    assert expected[2][0].data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("rows", [2, 100])
def test_of_an_expression(ops, rows):
    torch.manual_seed(0)
    x, grad = EXPRESSIONS["residual"](), stored()
    arguments = ops, x.spec, x.tensors, [True] * len(x.tensors)
    expected = materialise_backward(*arguments, grad.clone(), rows * ROW)
    memory = grad.clone()
    got = materialise_backward(*arguments, memory, rows * ROW, memory)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got[0].data_ptr() == memory.data_ptr()


def test_where_rows_are_not_the_same_nothing_is_overwritten(ops):
    torch.manual_seed(0)
    x, weight = EXPRESSIONS["raw"](), torch.randn(C, C, 3, 3, 3)
    window = Window((3, 3, 3), (2, 2, 2))
    y, grad = (torch.randn(2, C, *window.output_size(SIZE)) for _ in range(2))
    before = grad.clone()
    conv3d_backward(
        ops, x.spec, x.tensors, [True] * 4, weight, window, y, None, grad, None, None, True, False, ROW,
        consumes=True,
    )  # fmt: skip
    assert torch.equal(grad, before)
