"""The parser of every command line here."""

import argparse
from typing import NoReturn

EXIT_BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """argparse, whose usage errors are one line like every other error: `effseg: error: ...`, or with a
    module's name in place of `effseg` for `python -m package.module`."""

    def error(self, message: str) -> NoReturn:
        program = self.prog.rsplit(".", 1)[-1] if " -m " in self.prog else self.prog.split()[0]
        self.exit(EXIT_BAD_INPUT, f"{program}: error: {message} (see `{self.prog} --help`)\n")
