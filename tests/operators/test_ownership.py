"""A gradient's memory is used again only where nobody else can look at it."""

import pytest
import torch
from convertible import make
from torch._subclasses.fake_tensor import FakeTensorMode

import effseg
from effseg.common.settings import Function
from effseg.expressions.base import Normalisation
from effseg.expressions.joins import added
from effseg.expressions.layers import plain, raw
from effseg.expressions.slabs import Window
from effseg.operators import conv3d
from effseg.operators.backward import once_differentiable
from effseg.operators.materialise import materialise
from effseg.operators.ownership import is_alone


class Asking(Function):
    """x and two sums; whether its gradient is alone goes to `answers`."""

    @staticmethod
    def forward(ctx, x, answers):
        ctx.answers = answers
        return x * 2, x.sum(), x.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ctx.answers.append(is_alone(grads[0]))
        return grads[0] * 2, None


class Returning(torch.autograd.Function):
    """x, whose gradient is a tensor that it saved, or has as an attribute."""

    @staticmethod
    def forward(ctx, x, weight, saves):
        ctx.weight = None if saves else weight
        ctx.save_for_backward(weight if saves else None)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] if ctx.weight is None else ctx.weight, None, None


def ones():
    return torch.ones(3, requires_grad=True)


def used(y):
    return (y * torch.full((3,), 2.0)).sum()


def used_once(y):
    used(y).backward()


def looked_at(y):
    y.register_hook(lambda grad: None)
    used(y).backward()


def read_twice(y):
    (used(y) + used(y)).backward()


def kept_as_a_clone(y):
    y.retain_grad()
    used(y).backward()


def a_graph_that_is_kept(y):
    used(y).backward(retain_graph=True)


def kept_by_hook(y):
    y.kept = []
    y.register_hook(lambda grad: y.kept.append(grad))
    used(y).backward()


def kept_by_hook_as_a_view(y):
    y.kept = []
    y.register_hook(lambda grad: y.kept.append(grad.detach()))
    used(y).backward()


def seen_after_the_node(y):
    y.grad_fn.register_hook(lambda given, got: None)
    used(y).backward()


def kept_before_the_node(y):
    y.kept = []
    y.grad_fn.register_prehook(lambda grads: y.kept.append(grads))
    used(y).backward()


def kept_by_hook_of_several(y):
    y.kept = []
    torch.autograd.graph.register_multi_grad_hook([y], lambda grads: y.kept.append(grads))
    used(y).backward()


def given(y):
    y.backward(torch.ones(3))


def asked_for(y):
    torch.autograd.grad(used(y), [y, y.root])


def also_of_another(y):
    used(y.other + y).backward()


def saved_with_a_graph(y):
    Returning.apply(y, torch.ones(3), True).sum().backward(retain_graph=True)


def an_attribute(y):
    Returning.apply(y, torch.ones(3), False).sum().backward()


ALONE = (used_once, looked_at, read_twice, kept_as_a_clone, a_graph_that_is_kept)
HELD = (
    kept_by_hook, kept_by_hook_as_a_view, seen_after_the_node, kept_before_the_node, kept_by_hook_of_several,
    given, asked_for, also_of_another, saved_with_a_graph, an_attribute,
)  # fmt: skip


@pytest.mark.parametrize(
    ("do", "alone"),
    [(f, True) for f in ALONE] + [(f, False) for f in HELD],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_who_holds_a_gradient(do, alone):
    answers = []
    other = ones() * 1  # whose gradient waits, for its node is older
    y, *_ = Asking.apply(x := ones(), answers)
    y.root, y.other = x, other
    do(y)
    assert answers == [alone]


def test_fake_gradients_are_as_real_ones():
    with FakeTensorMode():
        answers = []
        used(Asking.apply(ones(), answers)[0]).backward()
    assert answers == [True]


def layer(x, weight):
    """A convolution, its normalisation and another convolution of that."""
    y, mean, var = conv3d(plain(x), weight, None, Window((3, 3, 3)))
    norm = Normalisation(mean, (var + 1e-5).rsqrt(), torch.zeros_like(mean))
    return y, conv3d(raw(y, norm, 0.01), weight, None, Window((3, 3, 3)))[0]


def test_gradients_lie_in_the_memory_of_the_one_they_are_made_of():
    torch.manual_seed(0)
    image = torch.randn(1, 4, 24, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(4, 4, 3, 3, 3, requires_grad=True)
    places = []

    def gradients(kept):
        x = image.clone(memory_format=torch.preserve_format).requires_grad_()
        weight.grad = None
        y, z = layer(x, weight)
        for t in (y, z):
            if kept is not None:
                t.register_hook(kept.append)
            t.register_hook(lambda grad: places.append(grad.data_ptr()))
        factor = torch.linspace(0, 1, z.numel()).view_as(z).contiguous(memory_format=torch.channels_last_3d)
        (z * factor).sum().backward()
        return x.grad, weight.grad, kept and [grad.clone() for grad in kept]

    reused = gradients(None)
    assert places[0] == places[1] == reused[0].data_ptr()
    held = gradients(kept := [])
    assert len({t.data_ptr() for t in (*kept, held[0])}) == 3
    for a, b in zip(reused[:2], held[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("slab_elements", [None, 1])
@pytest.mark.parametrize("samples", [1, 2])
def test_terms_of_a_sum_whose_gradient_lies_in_the_memory_of_the_sum_s(samples, slab_elements):
    """The gradient of a stored term is the sum's, which the first term's comes to lie in."""
    torch.manual_seed(0)
    terms = [torch.randn(samples, 4, 3, 5, 2, dtype=torch.float64) for _ in range(3)]
    terms = [t.contiguous(memory_format=torch.channels_last_3d).requires_grad_() for t in terms]
    norm = Normalisation(*torch.rand(3, samples, 4, dtype=torch.float64))

    def gradients(of):
        return torch.autograd.grad(of.cos().sum(), terms)

    found = gradients(
        materialise(added(added(raw(terms[0], norm, 0.1), plain(terms[1])), plain(terms[2])), slab_elements)
    )
    mean, scale, beta = (t[:, :, None, None, None] for t in norm)
    layer = torch.nn.functional.leaky_relu((terms[0] - mean) * scale + beta, 0.1)
    torch.testing.assert_close(found, gradients(layer + terms[1] + terms[2]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("memory", ["raw", "block"])
def test_what_hooks_keep_of_a_converted_network_stays_as_it_was(memory):
    network, image = make("small")
    converted = effseg.convert(network, memory=memory)

    def kept(model):
        found = []
        handles = [
            m.register_full_backward_hook(lambda _m, _inputs, outputs: found.append(outputs[0]))
            for m in model.modules()
            if isinstance(m, torch.nn.Conv3d)
        ]
        model(image.clone().requires_grad_()).square().sum().backward()
        for handle in handles:
            handle.remove()
        return found

    for ours, theirs in zip(kept(converted), kept(network), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
