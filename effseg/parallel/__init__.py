"""One volume across several processes, exactly: see README.md."""

from effseg.parallel.mesh import data_group, mesh, rows, split

__all__ = ["data_group", "mesh", "rows", "split"]
