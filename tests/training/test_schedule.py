from itertools import pairwise

import pytest

from effseg.training.schedule import learning_rate


def test_warms_up_linearly_from_a_twentieth():
    rates = [learning_rate(step, 1000, 2.0) for step in range(80)]
    assert rates[0] == pytest.approx(0.1)
    steps = [b - a for a, b in pairwise(rates)]
    assert steps == pytest.approx([2.0 * 0.95 / 80] * 79)
    assert learning_rate(80, 1000, 2.0) == pytest.approx(2.0)


def test_falls_as_a_half_cosine_to_a_thousandth():
    assert learning_rate(540, 1000, 2.0) == pytest.approx(1.0)
    rates = [learning_rate(step, 1000, 2.0) for step in range(80, 1000)]
    assert all(a >= b for a, b in pairwise(rates))
    assert rates[-1] == pytest.approx(2e-3)


def test_short_runs_and_no_warm_up():
    assert learning_rate(0, 1, 1.0) == pytest.approx(0.05)
    assert learning_rate(0, 10, 1.0, warmup=0.0) == pytest.approx(1.0)
