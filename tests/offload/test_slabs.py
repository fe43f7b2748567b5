"""Slabs on their way to the host's memory and back: what comes, in which order, and what would go wrong."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from late_link import LateLink

from effseg.common.device import pretending
from effseg.common.formats import CHANNELS_LAST
from effseg.expressions.base import Deferred, Normalisation, incoming, readable, stand_in
from effseg.expressions.layers import raw
from effseg.expressions.slabs import Window, slabs
from effseg.offload.link import link
from effseg.offload.slabs import Incoming, Outgoing, counted

CPU = torch.device("cpu")
SHAPE = (2, 3, 11, 4, 5)


@pytest.fixture(params=["cpu", "immediate", "late"])
def way(request: pytest.FixtureRequest) -> Any:
    """How slabs move: not at all, when they are asked for, as late as the streams allow."""
    chosen = LateLink() if request.param == "late" else None
    with pretending("cpu" if request.param == "cpu" else "cuda"), link.set(chosen):
        yield request.param


@pytest.fixture
def late() -> Any:
    found = LateLink()
    with pretending("cuda"), link.set(found):
        yield found


def memory() -> torch.Tensor:
    return torch.empty(SHAPE).contiguous(memory_format=CHANNELS_LAST)


def sent(values: torch.Tensor, thickness: int) -> torch.Tensor:
    """To the host, slab by slab."""
    held = memory()
    going = Outgoing(held, CPU)
    for sample, _, _, here in slabs(SHAPE[0], SHAPE[2], thickness):
        going.put(sample, here, values[sample : sample + 1, :, here].clone())
    going.end()
    return held


def there(held: torch.Tensor) -> Deferred:
    terms = Normalisation(torch.zeros(SHAPE[:2]), torch.ones(SHAPE[:2]), torch.zeros(SHAPE[:2]))
    return raw(stand_in(SHAPE, held.dtype, CPU), terms, 1.0, held=held)


@pytest.mark.parametrize("thickness", [1, 2, 3, 5, 11])
def test_there_and_back(way: str, thickness: int) -> None:
    values = torch.randn(SHAPE)
    with counted() as traffic:
        held = sent(values, thickness)
        coming = incoming(held, thickness, CPU)
        for _ in range(2):  # sweeps may follow each other
            for sample, lo, hi, _ in slabs(SHAPE[0], SHAPE[2], thickness):
                assert torch.equal(coming.cut((lo, hi), sample)[0], values[sample, :, lo:hi])
    assert traffic.to_host == held.nbytes
    assert traffic.to_device == 2 * held.nbytes


@pytest.mark.parametrize("thickness", [1, 2, 4, 11])
@pytest.mark.parametrize("window", [Window((3, 3, 3)), Window((5, 1, 1)), Window((3, 3, 3), (2, 2, 2)), None])
def test_rows_that_two_slabs_read_are_copied_once(way: str, thickness: int, window: Window | None) -> None:
    values = torch.randn(SHAPE)
    x = there(sent(values, 3))
    rows = SHAPE[2] if window is None else window.output_size(SHAPE[2:])[0]
    with counted() as traffic:
        stored = readable(x.spec, x.tensors, window, thickness)
        for sample, lo, hi, _ in slabs(SHAPE[0], rows, thickness):
            if window is not None:
                lo, hi, _ = window.input_rows(lo, hi, SHAPE[2])
            assert torch.equal(x.spec.uses(lo, hi)[1].cut(stored[1], sample)[0], values[sample, :, lo:hi])
    assert traffic.to_device == values.nbytes
    assert traffic.to_host == 0


def test_two_slabs_are_on_the_device(late: LateLink) -> None:
    held = sent(torch.randn(SHAPE), 2)
    coming = incoming(held, 2, CPU)
    assert [tuple(slab.shape) for slab in coming.ring] == [(1, 3, 2, 4, 5)] * 2
    assert len(incoming(held[:1], 11, CPU).ring) == 1


def test_other_rows_than_planned(way: str) -> None:
    coming = incoming(memory(), 2, CPU)
    coming.cut((0, 2), 0)
    with pytest.raises(RuntimeError, match=r"rows \(4, 6\) of sample 0 are not the next ones"):
        coming.cut((4, 6), 0)


def test_a_sweep_that_ends_early_waits_for_its_copies(late: LateLink) -> None:
    coming = incoming(sent(torch.randn(SHAPE), 2), 2, CPU)
    coming.cut((0, 2), 0)
    del coming
    gc.collect()
    assert (late.joined, late.back[-1].done) == (1, True)
    going = Outgoing(memory(), CPU)
    going.put(0, slice(0, 2), torch.randn(1, 3, 2, 4, 5))
    del going
    gc.collect()
    assert (late.joined, late.out[-1].done) == (2, True)


# ---------------------------------------------------------------- planted faults
def back(values: torch.Tensor) -> bool:
    """Whether what comes back is what went."""
    coming = incoming(sent(values, 2), 2, CPU)
    cut = [coming.cut((lo, hi), n).clone() for n, lo, hi, _ in slabs(SHAPE[0], SHAPE[2], 2)]
    halves = [torch.cat(cut[: len(cut) // 2], 2), torch.cat(cut[len(cut) // 2 :], 2)]
    return torch.equal(torch.cat(halves), values)


def test_without_a_fault(way: str) -> None:
    assert back(torch.randn(SHAPE))


def test_a_fetch_that_nobody_waits_for_is_seen(late: LateLink, monkeypatch: pytest.MonkeyPatch) -> None:
    held = sent(torch.randn(SHAPE), 2)
    monkeypatch.setattr(late, "wait", lambda _: None)
    assert incoming(held, 2, CPU).cut((0, 2), 0).isnan().all()


def test_a_send_that_nobody_waits_for_is_seen(late: LateLink, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as planted:
        planted.setattr(late, "wait", lambda _: None)
        held = sent(torch.randn(SHAPE), 2)
    assert held.isnan().all()
    with pytest.raises(AssertionError, match="no longer held"):
        late.wait(late.out[-1])


def late_by_one(self: Incoming, rows: tuple[int, int], sample: int) -> torch.Tensor:
    _real_cut(self, rows, sample)
    before = max(self.position - 1, 0)
    return self.ring[before % 2][:, :, : rows[1] - rows[0]]


_real_cut = Incoming.cut


@pytest.mark.parametrize("way", ["immediate", "late"], indirect=True)
def test_a_slab_late_by_one_is_seen(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Incoming, "cut", late_by_one)
    assert not back(torch.randn(SHAPE))


def test_a_fetch_into_the_slab_in_use_is_seen(late: LateLink, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Incoming._fetch

    def two_ahead(self: Incoming, i: int) -> None:
        real(self, i)
        if i + 1 < len(self.plan):
            real(self, i + 1)

    monkeypatch.setattr(Incoming, "_fetch", two_ahead)
    assert not back(torch.randn(SHAPE))


def test_a_copy_without_a_mark_is_seen(late: LateLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "mark", lambda: None)
    with pytest.raises(AssertionError, match="another moment"):
        sent(torch.randn(SHAPE), 2)
