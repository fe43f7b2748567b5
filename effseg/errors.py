"""The one exception for bad input, and the one warning for input that may not be what was meant."""


class InputError(ValueError):
    """Input that cannot be used: a file, an argument, a label map.

    The message is one line and names what was looked at, what was expected and what came. The command
    line prints it and exits with code 2; every other exception is a defect and keeps its traceback.
    """


class DamagedFile(InputError):
    """A file that is damaged, truncated or not of its kind: as good as missing."""


class InputWarning(UserWarning):
    """Input that can be used, but may not be what was meant: a header or intensities that need a guess.

    The message is one line and names what was looked at, what was found and what was made of it. The command
    line prints it on stderr and goes on.
    """


class LostProcess(RuntimeError):
    """Raised in what is left of a group of processes that has lost one."""
