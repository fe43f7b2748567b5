"""Which case and which random numbers a step uses: pure functions of (seed, step), so that a run can be
continued, or shared among processes, without any random state being stored or sent."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# The first number of a seed sequence says what it is for; two purposes never share a stream.
_ORDER, _AUGMENTATION = 1, 2


@dataclass(frozen=True)
class Draw:
    """One training sample: case `case`, seen in pass `epoch` over the cases, altered by `seed`."""

    case: int
    epoch: int
    seed: int


@dataclass(frozen=True)
class Sampler:
    """An endless sequence of the cases, a fresh permutation per epoch, cut into batches.

    A step takes the next `world_size` * `batch_size` cases; of these rank r takes the r-th part. So two
    processes with one case each see in a step what one process with two cases sees. The last batch of an
    epoch is filled from the next epoch. What a step sees, and how many steps there are, depends on the
    product alone, which a run therefore keeps to its end.
    """

    cases: int
    seed: int
    batch_size: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def steps(self, epochs: int) -> int:
        """Steps after which every case was seen at least `epochs` times."""
        return -(-self.cases * epochs // self.global_batch)

    def epoch(self, step: int) -> int:
        """The pass over the cases in which the batch of `step` begins."""
        return step * self.global_batch // self.cases

    def batch(self, step: int) -> list[Draw]:
        first = step * self.global_batch + self.rank * self.batch_size
        return [self._draw(position) for position in range(first, first + self.batch_size)]

    def _draw(self, position: int) -> Draw:
        epoch, place = divmod(position, self.cases)
        case = _permutation(self.cases, self.seed, epoch)[place]
        return Draw(case, epoch, _seed(_AUGMENTATION, self.seed, epoch, case))


@lru_cache(maxsize=4)
def _permutation(cases: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = np.random.default_rng((_ORDER, seed, epoch)).permutation(cases)
    return tuple(int(case) for case in order)


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])
