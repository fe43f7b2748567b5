"""Pictures are drawn from records alone, and their texts do not lie on each other."""

from itertools import combinations

import matplotlib.image
import pytest
from benchmark_records import GB, WHOLE, predicted, record, timed
from matplotlib.text import Text

from benchmarks import memory_plots, plots, speed_plots
from effseg.benchmarking.record import write
from effseg.figures.canvas import save
from effseg.figures.labels import spread

VOLUMES = ("96x96x96, 15 classes", "512x512x128, 15 classes", WHOLE)
PREDICTED = (2063, 1375, 1125, 762, 855, 275, 620, 186, 72, 55)
BYTES_PER_VOXEL = dict(zip(memory_plots.LINES, PREDICTED, strict=True))
MEMORY = record(
    *(
        predicted(name, count * factor, volume, dtype=dtype)
        for name, count in BYTES_PER_VOXEL.items()
        for volume in VOLUMES
        for dtype, factor in (("bf16", 1), ("fp32", 2))
    )
)
# Crowded on purpose.
SPEED = record(
    *(
        timed(name, 1 + i % 3 / 50, bytes_allocated=4 * GB // (1 + i), dtype=dtype)
        for i, name in enumerate(BYTES_PER_VOXEL)
        for dtype in ("fp32", "bf16")
    )
)
OPERATORS = record(
    *(
        timed(
            f"{name}/{contender}", seconds, suite="kernels", workload="256x256x256", dtype="bf16",
            task=name.split()[0], bytes_moved=10**9, macs=macs,
        )
        for i, name in enumerate(["conv3d_fwd C16", "conv3d_fwd C32", "conv3d_dgrad C32", "fold C32"])
        for contender, seconds in (("aten", 2e-3), ("triton", 1e-3))
        for macs in (10**10 * (1 + i),)
    ),
    gpu="NVIDIA H200",
)  # fmt: skip


@pytest.mark.parametrize(
    "figure",
    [
        memory_plots.modes([MEMORY]),
        memory_plots.against_volume([MEMORY, SPEED]),
        speed_plots.throughput(SPEED),
        speed_plots.throughput(
            record(*(timed(f"network {i}", 1 + i / 99, bytes_allocated=GB) for i in range(40)))
        ),
        speed_plots.roofline(OPERATORS),
    ],
    ids=["modes", "against_volume", "throughput", "many", "roofline"],
)
def test_texts_do_not_lie_on_each_other_and_are_in_the_picture(figure, tmp_path):
    save(figure, tmp_path / "figure.png")
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        boxes = {text.get_text(): Text.get_window_extent(text, renderer) for text in axes.texts}
        assert len(boxes) == len(axes.texts) > 0
        for (a, one), (b, other) in combinations(boxes.items(), 2):
            assert not one.overlaps(other), f"{a!r} lies on {b!r}"
        for text, box in boxes.items():
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text


def test_every_figure_is_drawn_from_the_files(tmp_path, capsys):
    for name, written in (("memory", MEMORY), ("cpu", SPEED), ("h200", OPERATORS)):
        write(written, tmp_path / "results" / f"{name}.json")
    assert plots.main(["--results", str(tmp_path / "results"), "--output", str(tmp_path / "pictures")]) == 0
    names = ["memory_against_volume", "memory_modes", "roofline_h200", "throughput_cpu"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"{n}.png" for n in names]
    for path in (tmp_path / "pictures").iterdir():
        picture = matplotlib.image.imread(path)
        assert picture.shape[1] > 700
        assert picture[..., :3].std() > 0.05
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_records_without_anything_to_draw_are_one_line(tmp_path, capsys):
    assert plots.main(["--results", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"plots: error: {tmp_path}: expected records")


def test_nothing_is_drawn_that_was_not_measured():
    assert memory_plots.modes([SPEED]) is None
    assert memory_plots.against_volume([SPEED]) is None
    assert speed_plots.throughput(MEMORY) is None
    assert speed_plots.roofline(SPEED) is None
    assert speed_plots.roofline(record(*OPERATORS.rows, gpu="NVIDIA Unknown")) is None


def test_measured_steps_are_points_of_their_contenders():
    rows = [
        predicted("unet3d/eager", 2000, bytes_allocated=GB),
        predicted("unet3d/eager", 2000, "64x64x64, 105 classes", bytes_allocated=GB),
        predicted("effseg-base/raw/aten", 200, bytes_allocated=GB),
    ]
    records = [record(*rows), record(timed("nnunet/eager", 1.0, dtype="bf16", bytes_allocated=GB), gpu="X")]
    found = memory_plots.measured(records, memory_plots.LINES, "bf16")
    assert [(row.contender, marker) for row, marker in found] == [
        ("unet3d/eager", "o"),
        ("nnunet/eager", "D"),
    ]


def test_the_pareto_line_has_what_nothing_beats_in_both():
    points = [(3, 5), (1, 1), (2, 4), (2, 3), (4, 5), (5, 6)]
    assert speed_plots.pareto(points) == [(1, 1), (2, 4), (3, 5), (5, 6)]


@pytest.mark.parametrize(
    ("wanted", "gap", "found"),
    [
        ([], 0.1, []),
        ([1.5], 0.1, [1.0]),
        ([0.9, 0.2, 0.5], 0.1, [0.9, 0.2, 0.5]),
        ([0.5, 0.5, 0.5], 0.1, [0.4, 0.5, 0.6]),
        ([0.0, 0.01], 0.1, [0.0, 0.1]),
        ([1.0, 0.99, 0.3], 0.1, [1.0, 0.9, 0.3]),
        ([0.2, 0.3, 0.4], 0.9, [0.0, 0.5, 1.0]),
    ],
)
def test_labels_are_spread_no_further_than_needed(wanted, gap, found):
    assert spread(wanted, gap) == pytest.approx(found)
