"""The one exception for bad input."""


class InputError(ValueError):
    """Input that cannot be used: a file, an argument, a label map.

    The message is one line and names what was looked at, what was expected and what came. The command
    line prints it and exits with code 2; every other exception is a defect and keeps its traceback.
    """


class DamagedFile(InputError):
    """A file that is damaged, truncated or not of its kind: as good as missing."""
