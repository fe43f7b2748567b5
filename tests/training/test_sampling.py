import pytest

from effseg.training.sampling import Sampler


def test_every_epoch_is_a_permutation_and_no_two_are_equal():
    sampler = Sampler(cases=7, seed=3)
    epochs = [tuple(sampler.batch(step)[0].case for step in range(e * 7, e * 7 + 7)) for e in range(5)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 5


def test_depends_on_seed_and_step_alone():
    forward = [Sampler(5, 1).batch(step) for step in range(30)]
    backward = [Sampler(5, 1).batch(step) for step in reversed(range(30))][::-1]
    assert forward == backward
    assert forward != [Sampler(5, 2).batch(step) for step in range(30)]


def test_augmentation_seeds_do_not_repeat():
    seeds = [Sampler(5, 1).batch(step)[0].seed for step in range(500)]
    assert len(set(seeds)) == 500


@pytest.mark.parametrize(("world", "batch"), [(2, 1), (2, 3), (3, 2)])
def test_processes_share_what_one_process_would_see(world, batch):
    alone = Sampler(5, 1, batch_size=world * batch)
    for step in range(20):
        parts = [Sampler(5, 1, batch, rank, world).batch(step) for rank in range(world)]
        assert [draw for part in parts for draw in part] == alone.batch(step)


def test_counts_epochs():
    sampler = Sampler(cases=5, seed=0, batch_size=2)
    assert sampler.steps(epochs=1) == 3
    assert sampler.steps(epochs=2) == 5
    assert [sampler.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]
