"""Records of benchmarks on machines that nobody has."""

from typing import Any

from effseg.benchmarking.record import MACHINE, VERSIONS, Record, Row

GB = 10**9
WHOLE = "512x512x512, 15 classes"


def record(*rows: Row, gpu: str | None = None, threads: int = 2, **conditions: Any) -> Record:
    """Of a machine with that GPU, or with none."""
    machine = dict.fromkeys(MACHINE) | {"cpu": "Some CPU", "threads": threads, "gpu": gpu}
    versions = dict.fromkeys(VERSIONS) | {"torch": "2.13.0"}
    return Record(machine, versions, conditions, rows)


def timed(contender: str, median: float, spread: float = 0.01, **fields: Any) -> Row:
    """A training step of so many seconds, its band as wide as twice the relative spread."""
    fields = {
        "suite": "throughput",
        "workload": "96x96x96, 15 classes",
        "dtype": "fp32",
        "voxels": 96**3,
    } | fields
    low, high = (1 - spread) * median, (1 + spread) * median
    return Row(
        contender=contender,
        seconds_p20=low,
        seconds_p50=median,
        seconds_p80=high,
        voxels_per_second=fields["voxels"] / median,
        **fields,
    )


def predicted(contender: str, bytes_per_voxel: int, workload: str = WHOLE, **fields: Any) -> Row:
    """The peak of a training step."""
    d, h, w = map(int, workload.split(",")[0].split("x"))
    fields = {"dtype": "bf16", "voxels": d * h * w, "parameters": 1_760_000} | fields
    return Row("memory", contender, workload, bytes_predicted=bytes_per_voxel * d * h * w, **fields)
