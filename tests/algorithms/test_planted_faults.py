"""What compares whole convolutions of expressions sees a thousandth too much in one place, and a lost row."""

import faults
import pytest
import torch
from expressions import Case, assert_convolved, leaf
from tolerances import relative_error

import effseg
from effseg import functional
from effseg.algorithms.aten import convolution
from effseg.algorithms.triton import fused
from effseg.algorithms.triton import ops as triton
from effseg.expressions.slabs import Window

FAULTS = {
    "a tap of the forward": ("conv3d_forward", lambda f: faults.before(f, 1, faults.tap)),
    "a voxel of the output": ("conv3d_forward", lambda f: faults.after(f, 2, faults.border)),
    "a tap of dgrad": ("conv3d_dgrad", lambda f: faults.before(f, 1, faults.tap)),
    "a tap of wgrad": ("conv3d_wgrad", lambda f: faults.result(f, faults.tap)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_in_a_kernel(fault, monkeypatch):
    name, make = FAULTS[fault]
    for module in (triton, fused):
        monkeypatch.setattr(module, name, make(getattr(module, name)))
    with effseg.algorithm("triton"), pytest.raises(AssertionError, match="from exact, rounding"):
        assert_convolved(torch.float32, "raw", 16, (3, 5, 6), out_channels=16)


@pytest.mark.parametrize("kind", ["raw", "residual", "up_add"])
def test_in_a_convolution_of_aten(kind, monkeypatch):
    monkeypatch.setattr(convolution, "_convolve", faults.before(convolution._convolve, 1, faults.tap))
    with pytest.raises(AssertionError, match="from exact, rounding"):
        assert_convolved(torch.float32, kind, 16, (3, 5, 6), out_channels=16)


def test_a_lost_row_of_a_halo(monkeypatch):
    """A slab that is given zeros for the row before it."""
    input_rows = Window.input_rows

    def without_halo(self, lo, hi, rows):
        first, last, (before, after) = input_rows(self, lo, hi, rows)
        return (first, last, (before, after)) if before else (first + 1, last, (1, after))

    def convolved():
        case = Case("raw", n=1, size=(9, 4, 5))
        return functional.conv3d(case.deferred(), leaf(4, 3, 3, 3, 3), slab_elements=90)[0]

    expected = convolved()
    assert relative_error(convolved(), expected) == 0
    monkeypatch.setattr(Window, "input_rows", without_halo)
    assert relative_error(convolved(), expected) > 0.1
