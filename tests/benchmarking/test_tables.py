"""Tables hold what records hold; the committed READMEs agree with the committed results."""

import pytest
from benchmark_records import GB, predicted, record, timed

from benchmarks import auto, tables
from benchmarks.auto import Cell
from effseg.benchmarking import tabulation
from effseg.benchmarking.record import Row, write
from effseg.benchmarking.results import label
from effseg.errors import InputError
from effseg.memory.choice import Settings


def test_the_committed_readmes_agree_with_the_committed_results(capsys):
    text = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert [text.count(f"<!-- benchmark: {name} -->") for name in tables.BLOCKS] == [1] * len(tables.BLOCKS)
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("contender", "text"),
    [
        ("unet3d/eager", "3D U-Net (Cicek 2016)"),
        ("unet3d/checkpoint", "3D U-Net (Cicek 2016), checkpointed"),
        ("stock-effseg-base/eager", "EffSegNet base, stock torch"),
        ("stock-effseg-base/compile", "EffSegNet base, stock torch, torch.compile"),
        ("effseg-base/raw/auto", "EffSegNet base, raw"),
        ("effseg-base/stream+1/triton", "EffSegNet base, stream, level 1 recomputed, Triton"),
        ("effseg-large-w32/stream/aten", "EffSegNet large-w32, stream, ATen"),
        ("somebody/eager", "somebody"),
    ],
)
def test_contenders_are_called_as_people_call_them(contender, text):
    assert label(contender) == text


# Tables of records


def test_memory_is_told_beside_the_baselines_and_what_is_missing_is_said():
    peaks = {"bytes_allocated": 210 * 512**3, "bytes_predicted_reserved": 204 * 512**3}
    gpu = record(predicted("effseg-base/raw/auto", 200, **peaks), gpu="NVIDIA H200")
    table = tabulation.memory([record(predicted("unet3d/eager", 2000), predicted("nnunet/eager", 1000)), gpu])
    assert table.title == "One training step on 512x512x512, 15 classes, bf16: peak memory"
    by_name = {row[0]: row[1:] for row in table.rows}
    assert by_name["3D U-Net (Cicek 2016)"] == (
        "250.00 GiB", "100.0 %", "2000", "not predicted", "not measured", "1.76 M"
    )  # fmt: skip
    assert by_name["EffSegNet base, raw"] == (
        "25.00 GiB", "10.0 %", "200", "25.50 GiB", "26.25 GiB (NVIDIA H200)", "1.76 M"
    )  # fmt: skip
    assert by_name["EffSegNet base, stream"] == (*["not predicted"] * 4, "not measured", "not counted")
    assert "| **EffSegNet base, raw** |" in table.markdown()


def test_throughput_is_told_beside_the_twin_in_stock_torch():
    (table,) = tabulation.throughput(
        record(
            timed("stock-effseg-base/eager", 2.0, bytes_allocated=4 * 2**30),
            timed("effseg-base/raw/auto", 1.0, bytes_allocated=2**30),
            timed("unet3d/eager", 10.0),
            Row(
                "throughput", "nnunet/eager", "96x96x96, 15 classes", "fp32", status="wrong", reason="loss 1"
            ),
            Row(
                "throughput",
                "dynunet/eager",
                "96x96x96, 15 classes",
                "fp32",
                status="skipped",
                reason="--full",
            ),
        )
    )
    assert table.title == (
        "One training step, 96x96x96, 15 classes, fp32, relative to EffSegNet base, stock torch; "
        "Some CPU, 2 threads, torch 2.13.0"
    )
    assert table.rows == (
        ("EffSegNet base, stock torch", "2 (1.98 to 2.02)", "1.00x", "0.442 M", "4.00 GiB", "1.00x"),
        ("EffSegNet base, raw", "1 (0.99 to 1.01)", "0.50x", "0.885 M", "1.00 GiB", "0.25x"),
        ("3D U-Net (Cicek 2016)", "10 (9.9 to 10.1)", "5.00x", "0.0885 M", "not measured", "not measured"),
        ("nnU-Net PlainConvUNet", "wrong", *["not measured"] * 4),
    )
    assert table.emphasised == {1}


def test_throughput_has_a_table_for_each_workload_dtype_and_task():
    rows = [
        timed("unet3d/eager", 1.0, **fields)
        for fields in ({}, {"dtype": "bf16"}, {"task": "infer"}, {"workload": "128x128x128, 15 classes"})
    ]
    titles = [table.title for table in tabulation.throughput(record(*rows))]
    assert len(titles) == len(set(titles)) == 4


def operator(contender, seconds, **fields):
    fields = {"bytes_moved": 48 * GB // 10, "macs": 0, "task": "fold"} | fields
    return timed(f"fold C32/{contender}", seconds, suite="kernels", workload="256x256x256", **fields)


def test_kernels_are_told_as_part_of_the_floor():
    absent = Row("kernels", "fold C32/eager", "256x256x256", "fp32", status="skipped", reason="none such")
    full = Row("kernels", "fold C32/compile", "256x256x256", "fp32", status="out of memory", reason="full")
    rows = (operator("aten", 2e-3), operator("triton", 1.25e-3), absent, full)
    (table,) = tabulation.kernels(record(*rows, gpu="NVIDIA H200"))
    assert table.columns == ("operator", "size", "floor", "aten", "triton", "eager", "compile")
    assert table.rows == (
        ("fold C32", "256x256x256", "1", "2 (50 %)", "1.25 (80 %)", "not measured", "out of memory"),
    )
    (table,) = tabulation.kernels(record(*rows, gpu="NVIDIA Unknown"))
    assert table.rows[0][2:5] == ("not known", "2", "1.25")
    assert tabulation.kernels(record(absent)) == []


def test_a_run_prints_every_suite_and_why_contenders_were_not_run():
    skipped = [
        Row("memory", name, "64x64x64, 15 classes", "bf16", status="skipped", reason="only with --full")
        for name in "abcdeb"
    ]
    run = record(
        predicted("unet3d/eager", 2000), *skipped, timed("unet3d/eager", 1.0), operator("aten", 1e-3)
    )
    assert [table.rows[0][0] for table in tabulation.of_run(run)] == [label("unet3d/eager")] * 2 + [
        "fold C32"
    ]
    assert tabulation.skipped(run) == ["not run: memory: only with --full: 5 (a, b, c, d, ...)"]


# What auto takes


def test_choices_survive_their_file_and_become_a_table(tmp_path):
    path = tmp_path / auto.FILE
    cells = [
        Cell(8, "512x512x128", Settings("stream", 1, 4), 2**33, 1.3721),
        Cell(8, "512x512x256", otherwise="the largest volume that fits is 512x512x136"),
    ]
    auto.write(cells, path)
    assert auto.read(path) == cells
    table = auto.table(cells)
    assert table.columns == ("budget", "512x512x128", "512x512x256")
    assert table.rows == (("8 GB", "stream + 1, 4 rows: 8.00 GiB, 1.37x", "up to 512x512x136"),)


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 2}', '{"schema": 1, "cells": [{"x": 1}]}'])
def test_other_files_of_choices_are_refused(tmp_path, content):
    path = tmp_path / auto.FILE
    path.write_text(content)
    with pytest.raises(InputError, match=auto.FILE):
        auto.read(path)


def test_a_choice_is_predicted(monkeypatch):
    def choose(*arguments):
        raise InputError("memory: needs 9 GiB, the budget is 1 GiB; no 512x512 volume fits")

    monkeypatch.setattr(auto, "choose", choose)
    assert str(auto.predicted(1, auto.WORKLOADS[0])) == "no 512x512 volume fits"


# The file


@pytest.fixture
def readme(tmp_path):
    """A file with a block, beside results."""
    write(record(predicted("unet3d/eager", 2000)), tmp_path / "results" / "memory.json")
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- benchmark: memory -->\nold\n<!-- end -->\nafter\n")
    return path


def test_blocks_are_made_anew_and_the_rest_is_left(readme, capsys):
    arguments = ["--results", str(readme.parent / "results"), str(readme)]
    old = readme.read_text()
    assert tables.main(["--check", *arguments]) == 1
    assert capsys.readouterr().out == "differs: memory\n"
    assert readme.read_text() == old
    assert tables.main(arguments) == 0
    assert capsys.readouterr().out == "made anew: memory\n"
    lines = readme.read_text().splitlines()
    assert lines[:3] == ["before", "<!-- benchmark: memory -->", lines[2]]
    assert lines[2].startswith("| network | predicted peak |")
    assert lines[-2:] == ["<!-- end -->", "after"]
    assert tables.main(["--check", *arguments]) == 0
    assert capsys.readouterr().out == ""


def test_without_results_a_block_says_so(readme):
    readme.write_text(
        "".join(f"<!-- benchmark: {name} -->\n<!-- end -->\n" for name in ("cpu", "gpu", "kernels"))
    )
    text, differing = tables.regenerated(readme.read_text(), readme.parent / "results")
    assert text.count("Not measured.") == 3
    assert differing == ["cpu", "gpu", "kernels"]


def test_times_of_cpus_and_of_gpus_have_their_blocks(readme):
    folder, rows = readme.parent / "results", []
    for dtype in ("fp32", "bf16"):
        rows += [
            timed("unet3d/eager", 1.0, dtype=dtype, bytes_allocated=GB),
            timed("unet3d/compile", 1.0, dtype=dtype),
            timed("unet3d/eager", 1.0, dtype=dtype, task="infer"),
            operator("aten", 1e-3, dtype=dtype, macs=GB),
        ]
    write(record(*rows), folder / "a.json")
    write(record(*rows, gpu="NVIDIA H200"), folder / "b.json")
    steps = {"cpu": tables.cpu_block(folder), "gpu": tables.gpu_block(folder)}
    for name, dtype, block in (("a", "fp32", steps["cpu"]), ("b", "bf16", steps["gpu"])):
        picture, title, table = block.split("\n\n")
        assert picture == f"![throughput against memory](results/throughput_{name}.png)"
        assert title.startswith(f"One training step, 96x96x96, 15 classes, {dtype}, relative to ")
        assert len(table.splitlines()) == 3
    picture, title, table = tables.kernels_block(folder).split("\n\n")
    assert picture.endswith("(results/roofline_b.png)")
    assert title.startswith("Operators, bf16; NVIDIA H200")
    assert len(table.splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<!-- benchmark: speed -->\n<!-- end -->\n", "speed: expected a block of memory"),
        ("<!-- benchmark: memory -->\n", "memory: expected a line <!-- end -->"),
        ("<!-- benchmark: auto -->\n<!-- end -->\n", "auto.json"),
    ],
)
def test_what_cannot_be_made_is_one_line(readme, capsys, text, named):
    readme.write_text(text)
    assert tables.main(["--results", str(readme.parent / "results"), str(readme)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tables: error: ")
    assert named in line
    assert readme.read_text() == text


# Records of runs that ended early


def test_partial_records_fill_what_they_have(readme):
    """A GPU that has timed two of its steps, each with what it took, and has run out of memory in a third."""
    names = ("effseg-base/raw/aten", "effseg-base/stream/triton", "unet3d/eager")
    whole = {"workload": "512x512x512, 15 classes", "dtype": "bf16", "voxels": 512**3}
    rows = [
        timed(names[0], 1.0, bytes_allocated=24 * 2**30, bytes_reserved=25 * 2**30, **whole),
        timed(names[1], 0.5, bytes_allocated=9 * 2**30, bytes_reserved=10 * 2**30, **whole),
        Row("throughput", names[2], whole["workload"], "bf16", status="out of memory", reason="1 TiB"),
        Row("throughput", "nnunet/eager", whole["workload"], "bf16", status="failed", reason="SIGABRT"),
        Row("checks", "doctor", "every device", "all", "doctor", reason="gpu: ok"),
    ]
    folder = readme.parent / "results"
    write(record(*rows, gpu="NVIDIA H200", begun={"x": 1}), folder / "nvidia-h200.json")
    write(record(*rows[:1], gpu="NVIDIA H200", tuned=True), folder / "nvidia-h200-tuned.json")
    cells = {line.split(" | ")[0]: line for line in tables.memory_block(folder).splitlines()}
    assert "| 24.00 GiB, 25.00 GiB reserved (NVIDIA H200) |" in cells["| **EffSegNet base, raw**"]
    assert "| not measured |" in cells["| **EffSegNet base, stream**"]  # by Triton alone
    assert "| out of memory (NVIDIA H200) |" in cells["| 3D U-Net (Cicek 2016)"]
    steps = tables.gpu_block(folder)
    assert "| **EffSegNet base, raw, ATen** | 1 (0.99 to 1.01) |" in steps
    assert "| **EffSegNet base, stream, Triton** | 0.5 (" in steps
    assert "| nnU-Net PlainConvUNet | failed |" in steps
    assert steps.count("NVIDIA H200, torch 2.13.0, tuned kernels:") == 1
