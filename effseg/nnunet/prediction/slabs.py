"""Windows of a volume through networks, and finished planes of logits out of it."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations, product

import torch
from torch import Tensor, nn

from effseg.errors import InputError
from effseg.nnunet.prediction.ring import Ring
from effseg.nnunet.prediction.windows import Windows

Start = tuple[int, int, int]


class Ensemble:
    """Mean logits of networks over a window and its mirror images.

    mirror_axes: spatial axes, 0 the first. autocast: a type of 16 bits, or None for float32. previous: the
    labels of a cascade's previous stage: the image's last channel then holds them as numbers, and the
    networks are shown a channel for each.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        mirror_axes: Sequence[int],
        autocast: torch.dtype | None,
        previous: Sequence[int] = (),
    ) -> None:
        self.previous = list(previous)
        self.networks, self.autocast = list(networks), autocast
        axes = [axis + 2 for axis in mirror_axes]
        self.flips = list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))

    def __call__(self, image: Tensor) -> Tensor:
        """(N, C, d, h, w) or (N, C, h, w) -> (N, K, ...) float32.

        Where a type of 16 bits overflows, the window is computed again in float32. Raises InputError where
        logits are not finite then either.
        """
        if self.previous:
            image, labels = image[:, :-1], image[:, -1:]
            image = torch.cat([image, *(labels == label for label in self.previous)], 1)
        logits = self._mean(image, self.autocast)
        if self.autocast is not None and not _finite(logits):
            logits = self._mean(image, None)
        if not _finite(logits):
            raise InputError("the network's logits are not finite: its weights or the scan hold inf or NaN")
        return logits

    def _mean(self, image: Tensor, autocast: torch.dtype | None) -> Tensor:
        total: Tensor | None = None
        with torch.autocast(image.device.type, autocast, enabled=autocast is not None):
            for network, axes in product(self.networks, self.flips):
                logits = network(image.flip(axes) if axes else image)
                logits = (logits.flip(axes) if axes else logits).float()
                total = logits if total is None else total.add_(logits)
        assert total is not None
        return total.div_(len(self.networks) * len(self.flips))


def _finite(logits: Tensor) -> bool:
    """A sum is finite where all are, but for an overflow of the sum itself, which is then looked at."""
    return bool(logits.sum().isfinite()) or bool(logits.isfinite().all())


class Slabs:
    """Slides a window over a volume and hands planes on as soon as no further window covers them."""

    def __init__(
        self, windows: Windows, ensemble: Ensemble, device: torch.device, batch: int, on_device: bool
    ) -> None:
        self.windows, self.ensemble, self.device = windows, ensemble, device
        self.batch = batch
        self.ring_device = device if on_device else torch.device("cpu")

    def __len__(self) -> int:
        d, h, w = map(len, self.windows.starts)
        return d * h * w

    def planes(
        self, image: Tensor, classes: int, tell: Callable[[int], None] = lambda windows: None
    ) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """Of an image (C, D, H, W): indices along D, ascending, each with a function that gives the logits
        (K, H, W) and is to be called, if at all, before the next plane. tell: called with numbers of windows.
        """
        ring = self._ring(classes)
        weights = self.windows.weights().to(ring.sums.device)
        depths, *rest = self.windows.starts
        ends = [*depths[1:], image.shape[1]]
        for depth, end in zip(depths, ends, strict=True):
            starts = [(depth, row, column) for row, column in product(*rest)]
            for start, logits in self._logits(image, starts):
                ring.add(start, logits.to(ring.sums.device), weights)
                tell(1)
            for plane in range(depth, end):
                yield plane, lambda plane=plane: ring.logits(plane)  # type: ignore[misc]
                ring.clear(plane)

    def _ring(self, classes: int) -> Ring:
        """On the GPU where it has room, else on the CPU."""
        size, (_, height, width) = self.windows.size, self.windows.volume
        try:
            return Ring(classes, size[0], height, width, self.ring_device)
        except torch.OutOfMemoryError:
            self.ring_device = torch.device("cpu")
            return Ring(classes, size[0], height, width, self.ring_device)

    def _logits(self, image: Tensor, starts: Sequence[Start]) -> Iterator[tuple[Start, Tensor]]:
        """Logits (K, d, h, w) of windows, a batch at a time, fewer where the GPU has no room for it."""
        done = 0
        while done < len(starts):
            some = starts[done : done + self.batch]
            try:
                logits = self._batch(image, some)
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2
                continue
            yield from zip(some, logits, strict=True)
            done += len(some)

    def _batch(self, image: Tensor, starts: Sequence[Start]) -> Tensor:
        cut = [self._window(image, start) for start in starts]
        stacked = torch.stack(cut).to(self.device, non_blocking=True)
        if self.windows.flat:
            return self.ensemble(stacked.squeeze(2)).unsqueeze(2)
        return self.ensemble(stacked)

    def _window(self, image: Tensor, start: Start) -> Tensor:
        sizes = zip(start, self.windows.size, strict=True)
        planes, rows, columns = (slice(first, first + size) for first, size in sizes)
        return image[:, planes, rows, columns]
