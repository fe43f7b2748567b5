"""What is compared with what, on which volumes, and how results are kept: the library under `benchmarks/`."""
