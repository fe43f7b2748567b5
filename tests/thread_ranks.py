"""Processes that share a volume, as threads of one: the same code over another transport, in milliseconds."""

import threading
from collections import defaultdict
from queue import SimpleQueue
from typing import Any

import torch

from effseg.parallel.partition import Split, entered


class Room:
    """Where the threads of a group meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.board: list[Any] = [None] * size
        self.boxes: dict[tuple[int, int], SimpleQueue] = defaultdict(SimpleQueue)


class Arrival:
    def __init__(self, box, tensor):
        self.box, self.tensor = box, tensor

    def wait(self):
        if self.box is not None:
            self.tensor.copy_(self.box.get(timeout=60))
            self.box = None


class Threads:
    """A transport: see `effseg.parallel.transport.Transport`."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank, self.size = room, rank, room.size
        self.sent = 0

    def exchange(self, sent, received):
        for peer, tensor in sent:
            self.sent += tensor.nbytes
            self.room.boxes[self.rank, peer].put(tensor.clone())
        return [Arrival(self.room.boxes[peer, self.rank], tensor) for peer, tensor in received]

    def gather(self, tensor):
        return self._all(tensor.clone())

    def tell(self, image, numbers):
        return self._all([image.shape[-3], *numbers])

    def _all(self, value):
        room = self.room
        room.board[self.rank] = value
        room.barrier.wait(60)
        found = list(room.board)
        room.barrier.wait(60)
        return found


def in_ranks(size, function):
    """[function(split) for every rank], at the same time, each inside its split."""
    room, found, errors = Room(size), [None] * size, []

    def work(rank):
        torch.set_num_threads(1)
        split = Split(Threads(room, rank))
        try:
            with entered(split):
                found[rank] = function(split)
        except BaseException as error:
            errors.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        raise (real or errors)[0]
    return found
