"""What tests run in processes of their own, which find it by this module's name."""

import os
import sys
import time

import torch


def tells(words, tell):
    for word in words:
        tell(word)


def tells_its_process(tell):
    tell(os.getpid())


def raises(tell):
    tell("first")
    raise ValueError("two\nlines")


def aborts(tell):
    tell("first")
    print("what():  CUDA error:\nan illegal memory access", file=sys.stderr, flush=True)
    os.abort()


def exits(tell):
    os._exit(3)


def hangs(tell):
    tell(os.getpid())
    time.sleep(600)


class ForkedLate:
    """In a process that is not `asker`'s own child its torch finds what it cannot use."""

    def __init__(self, asker):
        self.asker = asker

    def __setstate__(self, state):
        self.asker = state["asker"]
        if os.getppid() != self.asker:
            torch.cuda._is_in_bad_fork = lambda: True

    def __call__(self, tell):
        tell("from nothing")
