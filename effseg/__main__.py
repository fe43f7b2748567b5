"""`python -m effseg`, which `torchrun -m effseg train` needs."""

import sys

from effseg.cli import main

sys.exit(main())
