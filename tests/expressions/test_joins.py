"""Concatenation, transposed convolution, pooling and shared expressions against plain float64 torch."""

import pytest
import torch
import torch.nn.functional as F
from expressions import Case, leaf
from torch.autograd import gradcheck

from effseg import functional, operators
from effseg.expressions.joins import activation, added, cast, concatenation, pooling, transposed_conv

SIZE = (5, 4, 7)


class Composed:
    """A composed expression, its value in plain torch, and the leaves of both."""

    def __init__(self, kind):
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.second = Case("residual"), Case("up")
        self.weight, self.bias = leaf(3, 2, 2, 1, 3), leaf(2)

    def deferred(self):
        first, second = self.first.deferred(), self.second.deferred()
        match self.kind:
            case "concatenation":
                return concatenation([first, second, first])
            case "transposed":
                return transposed_conv(first, self.weight, self.bias)
            case "transposed, no bias":
                return transposed_conv(first, self.weight)
            case "maximum":
                return pooling(first, "max", (2, 2, 3))
            case "maximum, cut off":
                return pooling(first, "max", (2, 3, 2), ceil=True)
            case "average":
                return pooling(first, "average", (1, 2, 2))
            case "shared":
                return operators.share(first)
            case "prelu" | "prelu of one":
                return activation(first, "prelu", self.slopes())
            case "elu":
                return activation(first, "elu", alpha=0.7)
            case "gelu":
                return activation(first, "gelu", approximate="tanh")
            case "silu":
                return activation(first, "silu")
            case "sum":
                return operators.share(added(first, concatenation([pooling(first, "max", (1, 1, 1))])))
            case "rounded":
                return cast(cast(first, torch.float32), torch.float64)
        return concatenation(
            [operators.share(first), pooling(transposed_conv(second, self.square()), "max", (1, 1, 1))]
        )

    def square(self):
        return self.weight[:, :, :1, :1, :1]

    def slopes(self):
        flat = self.weight.flatten()
        return flat[:1] if self.kind == "prelu of one" else flat[:3]

    def eager(self):
        first, second = self.first.eager(), self.second.eager()
        match self.kind:
            case "concatenation":
                return torch.cat((first, second, first), 1)
            case "transposed":
                return F.conv_transpose3d(first, self.weight, self.bias, stride=(2, 1, 3))
            case "transposed, no bias":
                return F.conv_transpose3d(first, self.weight, stride=(2, 1, 3))
            case "maximum":
                return F.max_pool3d(first, (2, 2, 3))
            case "maximum, cut off":
                return F.max_pool3d(first, (2, 3, 2), ceil_mode=True)
            case "average":
                return F.avg_pool3d(first, (1, 2, 2))
            case "shared":
                return first
            case "prelu" | "prelu of one":
                return F.prelu(first, self.slopes())
            case "elu":
                return F.elu(first, 0.7)
            case "gelu":
                return F.gelu(first, approximate="tanh")
            case "silu":
                return F.silu(first)
            case "sum":
                return first + first
            case "rounded":
                return first.float().double()
        return torch.cat((first, F.conv_transpose3d(second, self.square())), 1)

    def leaves(self):
        return [*self.first.leaves(), *self.second.leaves(), self.weight, self.bias]


KINDS = (
    "concatenation", "transposed", "transposed, no bias", "maximum", "maximum, cut off", "average", "shared",
    "nested", "prelu", "prelu of one", "elu", "gelu", "silu", "sum", "rounded",
)  # fmt: skip


def gradients(value, leaves):
    torch.manual_seed(1)
    seed = torch.randn(value.shape, dtype=value.dtype)
    return torch.autograd.grad(value, leaves, seed, allow_unused=True)


@pytest.mark.parametrize("slab", [1, 100, None])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients(kind, slab):
    case = Composed(kind)
    value, expected = functional.materialise(case.deferred(), slab_elements=slab), case.eager()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(value, case.leaves()), gradients(expected, case.leaves()), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("slab", [1, None])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rounded"])  # of each slab
def test_convolution_of_it(kind, slab):
    case = Composed(kind)
    channels = case.eager().shape[1]
    weight, leaves = leaf(4, channels, 3, 3, 3), case.leaves()
    y, mean, var = functional.conv3d(case.deferred(), weight, slab_elements=slab)
    expected = F.conv3d(case.eager(), weight, padding=1)
    var_expected, mean_expected = torch.var_mean(expected, (2, 3, 4), correction=0)
    ours = (y.sin().sum() + (mean * var).sum(), [weight, *leaves])
    theirs = (expected.sin().sum() + (mean_expected * var_expected).sum(), [weight, *leaves])
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(gradients(*ours), gradients(*theirs), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_parts_of_several_types_give_the_widest():
    """As torch.cat and addition do, each part being rounded as it is."""
    first, second = Case("raw"), Case("raw", dtype=torch.float32)
    a, b = functional.materialise(first.deferred()), functional.materialise(second.deferred())
    for ours, theirs in (
        (concatenation([second.deferred(), first.deferred()]), torch.cat((b.double(), a), 1)),
        (added(second.deferred(), first.deferred()), b + a),
    ):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(functional.materialise(ours), theirs, rtol=0, atol=0)


def test_a_shared_expression_makes_one_gradient_for_each_reader():
    """Two readers of a sum of two tensors: two gradients, not four, and none of them is kept."""
    case = Case("residual", n=1, c=2, size=(4, 4, 4))
    shared = operators.share(case.deferred())
    standing = shared.tensors[0]
    assert standing.shape == shared.shape
    assert standing.untyped_storage().nbytes() == standing.element_size()
    assert not any(t.requires_grad for t in shared.tensors[1:])


def test_statistics_of_a_stored_tensor():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, 3, dtype=torch.float64).add(3).requires_grad_()
    for slab in (None, 1, 50):
        mean, var = operators.statistics(x, slab)
        expected = torch.var_mean(x, (2, 3, 4), correction=0)
        torch.testing.assert_close((var, mean), expected, rtol=1e-12, atol=1e-12)
        assert gradcheck(lambda t, slab=slab: operators.statistics(t, slab), x)
    mean, _ = operators.statistics(x)
    mean.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 60))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda x: concatenation([x, Case("raw", size=(5, 4, 6)).deferred()]),
            r"parts\[1\]: expected \(N, D, H, W\)",
        ),
        (lambda x: transposed_conv(x, leaf(4, 2, 2, 2, 2)), "weight: expected Ci = 3, got 4"),
        (lambda x: transposed_conv(x, leaf(3, 2)), r"weight: expected \(Ci, Co, kd, kh, kw\)"),
        (lambda x: activation(x, "tanh"), "kind: expected elu or gelu or silu or prelu, got tanh"),
        (lambda x: activation(x, "prelu"), 'weight: expected one for "prelu" alone, got None'),
        (lambda x: activation(x, "prelu", leaf(2)), r"weight: expected \(1,\) or \(3,\), got \(2,\)"),
        (lambda x: added(x, Case("raw", size=(5, 4, 6)).deferred()), "second: expected"),
        (lambda x: pooling(x, "median", (2, 2, 2)), "kind: expected max or average, got median"),
        (lambda x: pooling(x, "max", (6, 1, 1)), "inner: expected at least"),
        (lambda x: pooling(x, "average", (2, 2, 2), ceil=True), "ceil: expected False for averages"),
    ],
)
def test_wrong_arguments(make, line):
    with pytest.raises(ValueError, match=line):
        make(Case("raw").deferred())
