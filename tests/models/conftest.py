"""Presets that are there for tests alone."""

import pytest


@pytest.fixture
def few_levels(monkeypatch):
    from streamed import FEW  # not above: pytest reads this file before kernels are asked to be interpreted

    from effseg.models.levels import PRESETS

    monkeypatch.setitem(PRESETS, "few", FEW)
