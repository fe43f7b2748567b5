"""The model of a GPU step: devices, what a launch moves and computes, and what the page says."""

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.step_model import recording, report, work
from benchmarks.step_model.__main__ import PAGE, main
from benchmarks.step_model.compiled import Code
from benchmarks.step_model.devices import DEVICES, Assumptions
from benchmarks.step_model.model import Cost, Kernel, cost_of_operator, name_of
from effseg.errors import InputError
from effseg.expressions.slabs import Abridgement
from effseg.inspection.cases import CUBE, SIZE, Case, recorded

ANSWERS = Path(report.__file__).with_name("answers.json")
H100 = DEVICES["H100"]
CODE = Code(issue=100.0, flops=2 * 128 * 9 * 16 * 16, around=10.0, registers=0, spills=0, shared=0)
VOXELS = math.prod(SIZE)


def launch(op: str = "conv3d_fwd", channels: int = 16, fused: bool = False):
    (found, *_) = recorded(Case(op, channels, channels, CUBE, fused), "sm_90", "bf16")
    return found


@pytest.mark.parametrize(
    ("name", "rate"), [("A100", 312e12), ("H100", 989.4e12), ("H200", 989.4e12), ("RTX 4090", 165.2e12)]
)
def test_devices_multiply_as_fast_as_their_data_sheets_say(name, rate):
    assert DEVICES[name].flops == pytest.approx(rate, rel=0.01)


def test_devices_are_sane():
    for device in DEVICES.values():
        assert 100 <= device.multiprocessors <= 150
        assert 1e9 < device.clock < 3e9
        assert 1e12 < device.bandwidth < 5e12
        assert device.source


def test_bytes_of_a_convolution():
    """Input and output once, in two bytes, and 27 weights for each pair of channels."""
    assert work.moved(launch()) == 2 * (16 * VOXELS + 16 * VOXELS + 27 * 16 * 16)


def test_bytes_of_a_fused_gradient_of_the_input():
    """It also reads what the forward pass read, and leaves two sums for each tile."""
    found = launch("conv3d_dgrad", fused=True)
    tiles = found.grid[0]
    terms = 3 * 16 * 4
    assert work.moved(found) == 2 * (3 * 16 * VOXELS + 27 * 16 * 16) + tiles * 2 * 16 * 4 + terms


def test_a_march_reads_a_row_more_at_its_ends():
    """Rows 0 to 32 and 31 to 63, for 32 rows of output each."""
    assert work.computed(launch()) == 66 * SIZE[1] * SIZE[2]


@pytest.mark.parametrize("device", [H100, DEVICES["A100"]])
def test_products_of_a_convolution(device):
    _, tensor = work.clocks(launch(), CODE, device)
    flops = 2 * 27 * 16 * 16 * 66 * SIZE[1] * SIZE[2]
    programs = 2 * (SIZE[1] // 8) * (SIZE[2] // 16)
    per_program = flops / programs / device.flops_per_clock
    assert tensor == pytest.approx(per_program * math.ceil(programs / device.multiprocessors))


def test_twice_the_channels_are_four_times_the_products():
    (_, narrow), (_, wide) = (work.clocks(launch(channels=c), CODE, H100) for c in (16, 32))
    assert wide == pytest.approx(4 * narrow)


def test_issue_clocks_are_turns_times_body():
    """Three turns of the loop for a plane of a tile, and once what is around."""
    found = launch()
    issue, _ = work.clocks(found, CODE, H100)
    programs = math.prod(found.grid)
    tiles = work.computed(found) / (8 * 16)
    assert issue == pytest.approx(tiles / programs * math.ceil(programs / 132) * (3 * 100 + 10))


def test_an_operator_in_place_reads_and_writes():
    a, b = torch.empty(4, 8), torch.empty(8)
    found = recording.operator(torch.ops.aten.add_.Tensor, (a, b), {}, a)
    assert (found.bytes, found.shape) == (4 * (32 + 8 + 32), (4, 8))
    found = recording.operator(torch.ops.aten.copy_.default, (a, b.expand(4, 8)), {}, a)
    assert found.bytes == 4 * (32 + 8)


def test_products_of_the_library_are_padded():
    x, weight, y = torch.empty(1, 16, 4, 4, 4), torch.empty(16, 16, 3, 3, 3), torch.empty(1, 16, 4, 4, 4)
    args = (x, weight, None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1)
    found = recording.operator(torch.ops.aten.convolution.default, args, {}, y)
    assert found.flops == 2 * 27 * 16 * 16 * 64
    assumed = Assumptions(library_share=0.5, library_channels=32)
    assert cost_of_operator(found, H100, assumed).tensor == pytest.approx(
        4 * found.flops / (0.5 * H100.flops)
    )


def test_what_holds_a_kernel():
    kernel = Kernel("k")
    kernel.add(Cost(bytes=3e-6, issue=2e-6, tensor=1e-6), 10, 1e-6)
    assert (kernel.limit, kernel.launches) == ("bytes", 10)
    assert kernel.seconds == pytest.approx(40e-6)
    kernel.add(Cost(bytes=0.0), 100, 1e-6)
    assert kernel.limit == "gaps"


def test_names_tell_what_is_fused():
    assert name_of(launch(fused=True)) == "conv3d_slide 16->16 3x3x3 prologue statistics"
    assert name_of(launch("conv3d_wgrad")) == "wgrad pair3 16->16 3x3x3"


@pytest.mark.slow
def test_slabs_that_stand_for_others_are_counted_as_often(monkeypatch):
    arguments = "base stream", (96, 16, 16), "triton", "sm_90", 132
    few = recording.record(*arguments)
    monkeypatch.setattr(recording, "abridged", lambda: nullcontext(Abridgement()))
    every = recording.record(*arguments)
    assert len(few.launches) < len(every.launches)
    assert sum(count for _, count in few.launches) == len(every.launches)
    assert sum(few.operators.values()) == pytest.approx(sum(every.operators.values()), rel=0.02)


COMPILED = """
import sys
from pathlib import Path
from benchmarks.step_model.compiled import code_of
from effseg.inspection.cases import CUBE, Case, recorded
(launch,) = recorded(Case("conv3d_fwd", 16, 16, CUBE), sys.argv[2], "bf16")
for _ in range(2):
    code = code_of(launch, sys.argv[2], Path(sys.argv[1]), print)
print(code.flops, code.spills)
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_machine_code_multiplies_what_the_convolution_asks_for(tmp_path, architecture):
    """A turn is one row of taps, or a plane, of a tile: 9 or 27 products of its voxels, and no more."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED, str(tmp_path), architecture]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    compiling, figures = done.stdout.splitlines()  # compiled once
    assert compiling == f"conv3d_slide_kernel {architecture}"
    flops, spills = map(int, figures.split())
    assert flops in [2 * taps * 16 * 16 * 128 for taps in (9, 27)]
    assert spills == 0


def test_the_page_says_what_was_answered():
    found = json.loads(ANSWERS.read_text(encoding="utf-8"))
    text = report.markdown(found["rows"], Assumptions(**found["assumptions"]))
    page = PAGE.read_text(encoding="utf-8")
    assert f"## {report.TITLE}\n" in page
    assert f"{report.BEGIN}\n{text}\n{report.END}" in page


def test_a_page_without_the_section(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# A page\n", encoding="utf-8")
    with pytest.raises(InputError, match="expected one line"):
        report.put_into(page, "text")


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--library-share", "2"], "--library-share: expected more than 0 and at most 1, got 2"),
        (["--gap", "-1"], "--gap: expected at least 0, got -1"),
        (["--volume", "12", "--step", "base raw"], "12"),
    ],
)
def test_bad_input(arguments, wrong, capsys):
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert wrong in error
    assert error.count("\n") == 1
