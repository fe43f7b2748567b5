"""Centres of mass of resampled organs, brought back to where they were.

A vote decides voxel by voxel, and what it rounds at an organ's border need not cancel: a ball of a hundred
voxels may end up an eighth of a voxel aside. Among the voxels in which two classes are nearly even, a few are
given to the second one, so that every organ's centre stays in place.
"""

from dataclasses import dataclass

import numpy as np

# Largest difference between the shares of two classes of which either may be taken: first, and if need be.
NEARLY_EVEN, CONTESTED = 0.7, 0.95
TOLERANCE, BAR = 0.01, 0.02  # fine voxels: what is aimed at, and what contested voxels are given away for
FEW = 400  # voxels of an organ whose centre a single one moves by too much to be worth a contested one
_ROUNDS = 100  # for each organ at most; most need 5, thin neighbours at mixed factors up to 50
_PAIRED = 200  # voxels of which any two are tried together, where no single one helps
_LEAST = 1e-9  # squared fine voxels: what is gained by less is rounding


@dataclass(eq=False)
class Undecided:
    """Voxels that may be of either of two classes: indices (N, 3), classes (N,), differences of shares."""

    voxels: np.ndarray
    taken: np.ndarray
    other: np.ndarray
    margin: np.ndarray


def keep_centres(labels: np.ndarray, undecided: Undecided, before: np.ndarray) -> None:
    """Change some `undecided` voxels of `labels` so that organs have their centres of `before` again.

    before: the same organs on the grid they come from, with the same outer faces. Class 0 is background,
    whose centre is free. Organs that one of the two does not show are left as they are.
    """
    classes = 1 + int(before.max())
    factors = np.array(before.shape) / labels.shape
    old_counts, old_sums = _moments(before, classes)
    counts, sums = _moments(labels, classes)
    free = (old_counts == 0) | (counts == 0)
    free[0] = True
    wanted = (old_sums / np.maximum(old_counts, 1)[:, None] + 0.5) / factors - 0.5
    _Balance(
        labels, undecided, counts, sums - counts[:, None] * wanted, wanted, free, np.maximum(factors, 1)
    ).run()


class _Balance:
    """Moments of all organs about their wanted centres, in voxels, and the exchanges that lessen them."""

    def __init__(
        self,
        labels: np.ndarray,
        undecided: Undecided,
        counts: np.ndarray,
        moments: np.ndarray,
        wanted: np.ndarray,
        free: np.ndarray,
        unit: np.ndarray,
    ) -> None:
        self.labels, self.undecided, self.unit = labels, undecided, unit  # unit: fine voxels in one of labels
        self.counts, self.moments, self.wanted, self.free = counts, moments, wanted, free

    def run(self) -> None:
        """Take the organ that is furthest off, again and again; each time the sum of squares falls."""
        self.open = self.undecided.margin < NEARLY_EVEN
        self._run()
        if np.abs(self._errors())[self.counts > FEW].max(initial=0) > BAR:
            self.open[:] = True
            self._run()

    def _run(self) -> None:
        stuck = self.free.copy()
        for _ in range(_ROUNDS * len(stuck)):
            off = np.abs(self._errors()).max(1)
            off[stuck] = 0
            organ = int(off.argmax())
            if off[organ] <= TOLERANCE:
                return
            if self._improve(organ):
                stuck = self.free.copy()
            else:
                stuck[organ] = True

    def _errors(self) -> np.ndarray:
        """(K, 3) in fine voxels; 0 for the background."""
        errors = self.moments * self.unit / np.maximum(self.counts, 1)[:, None]
        errors[self.free] = 0
        return errors

    def _improve(self, organ: int) -> bool:
        """Exchange voxels between `organ` and others if that brings all nearer to their centres, in sum."""
        undecided, errors = self.undecided, self._errors()
        chosen = np.flatnonzero(self.open & ((undecided.taken == organ) | (undecided.other == organ)))
        own, cost = np.zeros((len(chosen), 3)), np.zeros(len(chosen))  # cost: of the other class of the two
        for classes, sign in ((undecided.taken[chosen], -1), (undecided.other[chosen], 1)):
            step = sign * (undecided.voxels[chosen] - self.wanted[classes]) * self.unit
            step /= np.maximum(self.counts[classes], 1)[:, None]
            step[self.free[classes]] = 0
            mine = classes == organ
            own[mine] = step[mine]
            cost += np.where(mine, 0, ((errors[classes] + step) ** 2 - errors[classes] ** 2).sum(1))
        gain = (errors[organ] ** 2).sum() - ((errors[organ] + own) ** 2).sum(1) - cost
        good = np.flatnonzero(gain > _LEAST)
        good = good[np.argsort(undecided.margin[chosen[good]] / gain[good], kind="stable")]
        course = ((errors[organ] + np.cumsum(own[good], axis=0)) ** 2).sum(1)
        # Together they may move a neighbour too far: then fewer at once, down to the best one alone.
        attempts, number = [], int(course.argmin()) + 1 if len(good) else 0
        while number:
            attempts.append(chosen[good[:number]])
            number //= 3
        if len(good):
            attempts.append(chosen[good[[gain[good].argmax()]]])
        few = np.argsort(undecided.margin[chosen], kind="stable")[:_PAIRED]
        if len(few) > 1:
            both = (
                ((errors[organ] + own[few] + own[few][:, None]) ** 2).sum(2) + cost[few] + cost[few][:, None]
            )
            np.fill_diagonal(both, np.inf)
            attempts.append(chosen[few[list(np.unravel_index(both.argmin(), both.shape))]])
        return any(self._exchange_if_better(which) for which in attempts)

    def _exchange_if_better(self, which: np.ndarray) -> bool:
        """Exchange, and back if centres are not nearer in sum or an organ has lost its last voxel."""
        before = (self._errors() ** 2).sum()
        self._exchange(which)
        losers = self.undecided.other[which]
        if self.counts[losers].min() > 0 and (self._errors() ** 2).sum() < before - _LEAST:
            return True
        self._exchange(which)
        return False

    def _exchange(self, which: np.ndarray) -> None:
        undecided = self.undecided
        voxels = undecided.voxels[which]
        for classes, sign in ((undecided.taken[which], -1), (undecided.other[which], 1)):
            np.add.at(self.counts, classes, sign)
            np.add.at(self.moments, classes, sign * (voxels - self.wanted[classes]))
        taken = undecided.taken[which].copy()
        undecided.taken[which], undecided.other[which] = undecided.other[which], taken
        self.labels[tuple(voxels.T)] = undecided.taken[which]


def _moments(labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of each class, (K,), and the sums of their indices, (K, 3)."""
    counts, sums = np.zeros(classes, np.int64), np.zeros((classes, 3))
    for index, plane in enumerate(labels):
        numbers = plane.astype(np.int64)
        found = np.bincount(numbers.reshape(-1), minlength=classes)
        counts += found
        sums[:, 0] += index * found
        for axis, extent in enumerate(plane.shape):
            positions = np.arange(extent).reshape((-1, 1) if axis == 0 else (1, -1))
            table = np.bincount((numbers * extent + positions).reshape(-1), minlength=classes * extent)
            sums[:, 1 + axis] += table.reshape(classes, extent) @ np.arange(extent)
    return counts, sums
