"""The opaque operators that torch.compile sees: their arguments, their fakes, their gradients."""

import pytest
import torch

from effseg.common.formats import CHANNELS_LAST
from effseg.expressions.layers import Conv, Plain, Raw, Residual, UpAdd
from effseg.expressions.slabs import Window
from effseg.operators.encoding import decode, encode
from effseg.operators.normalisation import Merging
from effseg.operators.opaque import gradients

WINDOW = Window((1, 3, 3), (1, 2, 1))
SHAPE = (1, 2, 4, 5, 6)
PLAIN = Plain(SHAPE, torch.float64)
RAW = Raw(SHAPE, torch.bfloat16, 0.01)


@pytest.mark.parametrize(
    "value",
    [
        Residual(SHAPE, torch.float16, 1 / 3, UpAdd(SHAPE, torch.float64, None, RAW, 0, True, (2, 1, 2))),
        Conv(SHAPE, torch.float32, float("inf"), Residual(SHAPE, torch.float32, 0.0, PLAIN), WINDOW),
        Merging(1e-5, groups=4),
        Merging(1e-5, samples=True),
        ("aten", None, True, 0, -100, ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_decoded_is_what_was_encoded(value):
    text, numbers = encode(value, WINDOW)
    assert decode(text, numbers) == (value, WINDOW)


def test_text_names_content_and_no_size():
    """Compiled code may be cached: what it holds must mean the same in another process."""
    text, numbers = encode("aten", RAW, None)
    assert (text, numbers) == ("('aten',Raw((_,_,_,_,_,),bfloat16,0.01,False),None,)", list(SHAPE))


@pytest.mark.parametrize("text", ["__import__('os')", "nn", "Tensor(_)", "[_]", "_.real"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="text: expected what encode writes"):
        decode(text, [1])


def test_gradients_are_laid_out_as_their_tensors_and_no_views():
    given, x = torch.rand(SHAPE), torch.rand(SHAPE)
    last = torch.rand(SHAPE).contiguous(memory_format=CHANNELS_LAST)
    found = gradients([given, last, last, None, x], [x] * 5, [True, True, True, True, False], [given])
    assert [t.stride() for t in found] == [x.stride()] * 4
    assert len({t.data_ptr() for t in (given, last, *found)}) == 6
    for got, expected in zip(found, [given, last, last, torch.zeros(SHAPE)], strict=True):
        assert torch.equal(got, expected)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def cases():
    torch.manual_seed(0)
    x, weight, head, bias = randn(*SHAPE), randn(3, 2, 1, 3, 3), randn(4, 3, 1, 1, 1), randn(4)
    labels = torch.randint(0, 4, (1, 4, 5, 6))
    y = randn(1, 3, 4, 5, 6)
    terms = [randn(1, 3) for _ in range(3)]
    raw = Raw(tuple(y.shape), y.dtype, 0.1)
    return {
        "conv3d": (*encode("aten", (True,) * 3, PLAIN, WINDOW, True, 50), [weight, randn(3), x]),
        "materialise": (*encode("aten", (True,) * 4, raw, 50), [y, *terms]),
        "stem_statistics": (
            *encode("aten", (True, True), WINDOW, x.dtype, 50, SHAPE[2]),
            [x.detach(), weight],
        ),
        "head_sums": (
            *encode("aten", (True,) * 8, raw, None, None, True),
            [labels, torch.rand(4), head, bias, y, *terms],
        ),
        "tail_sums": (
            *encode(
                "aten", (True, *[False] * 5, *[True] * 3, False, *[True] * 3), PLAIN, Window((1, 3, 3)), 0.1,
                None, Merging(1e-5), None, 1, 9, True,
            ),
            [labels, weight, randn(3), randn(3), head, bias, x],
        ),
        "segment": (*encode("aten", (True,) * 6, raw, None), [head, bias, y, *terms]),
        "probabilities": (
            *encode("aten", (True,) * 6, raw, None), [t.detach() for t in (head, bias, y, *terms)]
        ),
        "layer_statistics": (
            *encode("aten", (True, True), PLAIN, WINDOW, None, None, 1), [weight.detach(), x.detach()]
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_operator_keeps_its_word(name):
    """torch's own checks: schema, fake outputs, autograd, tracing with sizes as symbols."""
    torch.library.opcheck(getattr(torch.ops.effseg, name).default, cases()[name])
