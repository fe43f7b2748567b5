"""Random programs do the same, converted or not."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from programs import FULL, STATEMENTS, Network

import effseg
from effseg.conversion.convert import as_converted

TOLERANCE = 1e-8
"""Of the norm of all; norms over 12 values of a channel enlarge rounding errors."""

programs = st.lists(
    st.tuples(st.sampled_from(sorted(STATEMENTS)), st.integers(0, 5), st.integers(0, 5)),
    min_size=2,
    max_size=9,
)


def run(network, image, wants_gradient=True):
    """Everything that can be seen of a step: values, gradients, buffers."""
    image = image.clone().requires_grad_(wants_gradient)
    out = network(image)
    features = out["features"]
    random = torch.Generator().manual_seed(1)
    loss = image.sum() * 0
    for feature in features[-3:]:
        loss = loss + (feature * torch.randn(feature.shape, generator=random, dtype=torch.float64)).sum()
    values = [f.detach().clone() for f in features]
    loss.backward(retain_graph=True)
    loss.backward()
    gradients = {"image": image.grad} | {name: p.grad for name, p in network.named_parameters()}
    return values, [f.requires_grad for f in features], out["seen"], gradients, dict(network.named_buffers())


def check(program):
    torch.manual_seed(0)
    memory = ("raw", "block", "stream")[len(program) % 3]
    wants = memory != "stream"  # which stores the first layer for an image that wants a gradient
    network, image = Network(program).double(), torch.randn(1, 1, *FULL, dtype=torch.float64)
    other = copy.deepcopy(network)
    try:
        expected = run(network, image, wants)
    except RuntimeError:
        assume(False)  # torch refuses it too: something that backward needs was changed in place
    assume(all(v.isfinite().all() and v.abs().max() < 1e3 for v in expected[0]))
    converted = effseg.convert(other, strict=False, shape=image.shape)
    converted = as_converted(converted, memory)  # without a last layer for the loss
    compare(run(converted, image, wants), expected)
    with torch.no_grad():
        evaluated, exact = (each.eval()(image)["features"] for each in (converted, network))
    compare_values(evaluated, exact)


def compare(found, expected):
    values, requires, seen, gradients, buffers = expected
    compare_values(found[0], values)
    assert found[1] == requires
    assert found[2] == pytest.approx(seen, rel=TOLERANCE, abs=TOLERANCE)
    whole = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
    for name, b in gradients.items():
        a = found[3][name]
        if b is None or a is None:  # None and zeros are one to an optimizer's step without momentum
            assert a is b or (a if b is None else b).abs().max() == 0, name
        else:
            assert (a - b).norm() <= TOLERANCE * max(float(whole), 1.0), name
    for name, b in buffers.items():
        torch.testing.assert_close(found[4][name], b, rtol=TOLERANCE, atol=TOLERANCE)


def compare_values(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).norm() <= TOLERANCE * max(float(b.norm()), 1.0), f"feature {i}"


def every(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


@every(50)
@given(programs)
def test_random_programs(program):
    check(program)


@pytest.mark.slow
@every(500)
@given(programs)
def test_more_random_programs(program):
    check(program)
