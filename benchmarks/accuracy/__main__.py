"""`python -m benchmarks.accuracy`: see `equal_time`."""

import sys

from benchmarks.accuracy.equal_time import main

if __name__ == "__main__":
    sys.exit(main())
