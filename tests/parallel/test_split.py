"""One volume split across processes: what one process computes."""

import os
import time

import pytest
import torch
from gloo_processes import in_processes
from hypothesis import given
from hypothesis import strategies as st
from split_steps import Case, batch, largest_error, network, on_gloo, step
from thread_ranks import in_ranks

from effseg import parallel
from effseg.errors import InputError
from effseg.expressions.layers import plain
from effseg.parallel.halo import Halo
from effseg.parallel.partition import Split, entered
from effseg.parallel.transport import Pretended

TOLERANCE = 1e-9
EVERY_OPTION = {
    "class_weights": [1.0, 2.0, 0.5, 1.0, 3.0],
    "ignore_index": 2,
    "batch_dice": True,
    "label_smoothing": 0.1,
}
LEAN = {"memory": "stream", "recompute": 2, "auxiliary": True}
ODD = (67, 45, 38)
QUICK = {
    "raw": (2, Case((19, 12, 10))),
    "lean, every option of the loss": (3, Case((19, 12, 10), LEAN, EVERY_OPTION, samples=2)),
    "fewer coarse rows than processes": (5, Case((5, 9, 7), LEAN)),
    "tiny": (4, Case((17, 9, 10), {"preset": "tiny", "recompute": 1})),
    "batch norm": (2, Case((19, 12, 10), {"norm": "batch", "memory": "stream"}, samples=2)),
    "group norm": (3, Case((16, 9, 7), {"norm": "group"})),
    "thick rows": (2, Case((19, 12, 10), {"thick_axis": 0, "memory": "stream", "auxiliary": True})),
}
SLOW = {
    "base raw": Case(ODD),
    "base lean": Case(ODD, LEAN, EVERY_OPTION),
    "base, thick rows": Case(ODD, {"memory": "stream", "thick_axis": 0, "norm": "group"}),
    "base, batch norm": Case(ODD, {"memory": "stream", "norm": "batch"}, samples=2),
    "tiny": Case(ODD, {"preset": "tiny", "recompute": 2}),
}


def in_threads(size, case):
    def own(split):
        return step(case, slice(*split.rows(case.shape[0])), lambda: entered(split))

    return in_ranks(size, own)


def check(found, case):
    expected = step(case)
    assert largest_error(found, expected) <= TOLERANCE
    assert torch.equal(torch.cat([one.labels for one in found], 1), expected.labels)


@pytest.mark.parametrize(("size", "case"), QUICK.values(), ids=QUICK)
def test_a_step_is_that_of_one_process(size, case):
    check(in_threads(size, case), case)


def test_a_step_on_gloo_is_that_of_one_process():
    case = Case((16, 9, 7), {"memory": "stream", "recompute": 1})
    check(in_processes(2, on_gloo, case), case)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW)
def test_odd_sizes_on_gloo(size, case):
    check(in_processes(size, on_gloo, case), case)


def test_two_runs_give_the_same_bits():
    case = Case((13, 9, 7), LEAN)
    one, other = (in_threads(3, case) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert a.loss == b.loss
        assert all(torch.equal(x, y) for x, y in zip(a.gradients, b.gradients, strict=True))
    assert len({found.loss for found in one}) == 1


def logits(case, rows, around):
    with around():
        return network(case)(batch(case)[0][:, :, rows]).detach()


def test_logits_are_rows_of_the_whole():
    case = Case((19, 9, 7))
    found = in_ranks(3, lambda s: logits(case, slice(*s.rows(19)), lambda: entered(s)))
    whole = logits(case, slice(None), lambda: entered(None))
    assert (torch.cat(found, 2) - whole).abs().max() <= 1e-12


@given(total=st.integers(0, 50), size=st.integers(1, 9), data=st.data())
def test_what_one_process_wants_another_gives(total, size, data):
    splits = [Split(Pretended(rank, size, total)) for rank in range(size)]
    rows = [split.rows(total) for split in splits]
    assert [row for lo, hi in rows for row in range(lo, hi)] == list(range(total))
    needs = {}
    for rank in range(size):
        lo = data.draw(st.integers(0, total))
        needs[rank] = data.draw(st.sampled_from([None, (lo, data.draw(st.integers(lo, total)))]))
    halos = [Halo(split, total, needs.__getitem__) for split in splits]
    for rank, halo in enumerate(halos):
        wanted = [(piece.peer, piece.rows) for piece in halo.wanted]
        given_to_it = [(o, p.rows) for o, other in enumerate(halos) for p in other.given if p.peer == rank]
        assert wanted == given_to_it
        covered = [row for piece in halo.wanted for row in range(*piece.rows)]
        missing = set(range(*(needs[rank] or (0, 0)))) - set(range(*rows[rank]))
        assert sorted(covered) == sorted(missing)


DIFFERENT = {
    "image: expected one type": lambda rank, image: {"image": image.float() if rank else image},
    r"image: expected \(N, C, H, W\)": lambda rank, image: {"image": image[..., rank:]},
    "image: expected the rows of": lambda rank, image: {"image": image[:, :, : 4 - rank]},
    "settings: expected the same": lambda rank, image: {"auxiliary": bool(rank)},
}


@pytest.mark.parametrize(("message", "changed"), DIFFERENT.items(), ids=DIFFERENT)
def test_processes_that_differ_are_told(message, changed):
    case = Case((16, 9, 7))
    image = batch(case)[0]

    def own(split):
        values = {"image": image[:, :, slice(*split.rows(16))], "auxiliary": False}
        values |= changed(split.rank, values["image"])
        network(Case(case.shape, {"auxiliary": values["auxiliary"]})).segment(values["image"])

    with pytest.raises(InputError, match=message):
        in_ranks(2, own)


def test_a_part_does_not_pass_for_a_whole():
    split = Split(Pretended(0, 2, 8))
    with entered(split), pytest.raises(ValueError, match="x: expected rows, those of the whole volume"):
        plain(torch.zeros(1, 1, 4, 2, 2))
    with entered(split), pytest.raises(ValueError, match="x: expected this process's part of"):
        plain(torch.zeros(1, 1, 3, 2, 2), rows=8)


def refusals():
    mesh = parallel.mesh(volume=2)
    found = []
    for wrong in (
        lambda: parallel.mesh(volume=3),
        lambda: parallel.mesh(volume=0),
        lambda: parallel.rows((1, 1, 1, 4, 4), mesh),
    ):
        try:
            wrong()
        except ValueError as error:
            found.append(str(error))
    return found


def test_meshes_and_rows_that_do_not_fit_are_refused():
    assert (
        in_processes(2, refusals)
        == [
            [
                "mesh: expected data x volume = 2 processes, got 1 x 3",
                "volume: expected 1 or more, got 0",
                "shape: expected a row or more for each of 2 processes, got 1 rows",
            ]
        ]
        * 2
    )


def test_a_mesh_needs_a_process_group():
    with pytest.raises(ValueError, match=r"mesh: expected torch\.distributed\.init_process_group"):
        parallel.mesh(volume=2)


def dies(case):
    mesh = parallel.mesh(volume=3)
    image, labels = (t[..., parallel.rows(case.shape, mesh), :, :] for t in batch(case))
    with parallel.split(mesh):
        loss = network(case).loss(image, labels)
    if mesh.get_local_rank("volume") == 1:
        os._exit(1)
    loss.backward()


def test_what_is_left_of_a_group_ends():
    started = time.monotonic()
    found = in_processes(3, dies, Case((16, 9, 7)), timeout=60, tolerant=True)
    assert time.monotonic() - started < 60
    assert found[1] is None
    for text in (found[0], found[2]):
        line = text.strip().splitlines()[-1]
        assert line.startswith("effseg.errors.LostProcess: a process of the group"), text
