"""What is made once an operator."""

import torch

from effseg.common.once import made_once, making_once


class Maker:
    def __init__(self):
        self.calls = 0

    def __call__(self, source, factor):
        self.calls += 1
        return source * factor


def test_the_same_memory_is_made_once():
    make, source = Maker(), torch.arange(4.0)
    with making_once():
        found = [made_once(make, view, 2) for view in (source, source.detach(), source.view(4))]
        assert found[0] is found[1] is found[2]
        assert made_once(make, source, 3).tolist() == [0.0, 3.0, 6.0, 9.0]
        assert made_once(make, source[1:], 2).tolist() == [2.0, 4.0, 6.0]
        assert made_once(make, source.view(2, 2), 2).shape == (2, 2)
    assert make.calls == 4


def test_nothing_is_remembered_outside():
    make, source = Maker(), torch.arange(4.0)
    with making_once():
        first = made_once(make, source, 2)
        with making_once():
            assert made_once(make, source, 2) is not first
        assert made_once(make, source, 2) is first
    source += 1
    assert made_once(make, source, 2).tolist() == [2.0, 4.0, 6.0, 8.0]
    assert make.calls == 3


def test_memory_of_a_source_is_not_taken_for_another_ones():
    make = Maker()
    with making_once():
        for value in range(20):
            assert made_once(make, torch.full((1000,), float(value)), 1)[0] == value
    assert make.calls == 20
