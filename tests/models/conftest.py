"""Presets that are there for tests alone."""

import pytest
from streamed import FEW

from effseg.models.levels import PRESETS


@pytest.fixture
def few_levels(monkeypatch):
    monkeypatch.setitem(PRESETS, "few", FEW)
