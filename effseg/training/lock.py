"""One process at a time in a run's folder."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from effseg.common.run_folder import LOCK
from effseg.errors import InputError
from effseg.training.distributed import World

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(folder: Path, world: World, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `folder`, which is made, for all processes of `world`; its first one has the lock.

    The system's lock (flock) ends with the process that has it, however that ends. `say` is told where the
    file system has no locks. Raises InputError in every process where another one has the lock, or the folder
    cannot be made or written to.
    """
    held: list[int] = []
    world.on_main(lambda: held.append(_acquire(folder, say)))
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _acquire(folder: Path, say: Callable[[str], None]) -> int:
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: expected a folder that can be made, got: {error.strerror}") from error
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{folder}: expected a folder that can be written to: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            os.close(descriptor)
            raise InputError(
                f"{folder}: another process is training in this folder: wait for it, or use another output"
            ) from None
        say(f"{folder} cannot be locked ({error.strerror}): let no second process train in it")
    return descriptor
