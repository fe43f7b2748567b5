"""The inspector: reading machine code, and what compilers make of the kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import guard
from effseg.inspection import __main__ as inspect
from effseg.inspection import sass
from effseg.kernels.config import ARCHITECTURES, LOOPS

# A march: the loop from .L_x_1 branches to an unmasked and a masked product, then stores every other time.
MARCH = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @P0 EXIT ;
.L_x_1:
        /*0020*/                   ISETP.LT.AND P1, PT, R1, R2, PT ;
        /*0030*/              @P1 BRA `(.L_x_2) ;
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R72, R120, gdesc[UR24].tnspB, R72 ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0080*/              @P2 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/              @P2 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*00a0*/                   HGMMA.64x32x16.F32.BF16 R72, R120, gdesc[UR24].tnspB, R72 ;
.L_x_3:
        /*00b0*/              @P3 BRA `(.L_x_4) ;
        /*00c0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00d0*/                   STL [R1], R4 ;
.L_x_4:
        /*00e0*/                   BRA.U UP0, `(.L_x_1) ;
        /*00f0*/                   LDL R4, [R1] ;
        /*0100*/                   EXIT ;
.L_x_5:
        /*0110*/                   BRA `(.L_x_5);
"""


def products(instruction: sass.Instruction) -> int:
    return int(bool(instruction.mma))


def test_loops_are_found():
    code = sass.parse(MARCH)
    assert len(code.instructions) == 18
    (body,) = code.loops.values()
    starts = {code.instructions[code.blocks[b].start].text.split(" ")[0] for b in body}
    assert starts == {"ISETP.LT.AND", "LDG.E.128", "IADD3", "BRA", "STG.E.64", "BRA.U"}
    assert code.spills == 2


def test_the_interior_way_multiplies_and_stores_without_masks():
    code = sass.parse(MARCH)
    main, around = sass.main_and_around(code, products)
    assert (main.work, main.stored) == (1, 8)
    texts = [code.instructions[i].text for b in main.blocks for i in code.blocks[b]]
    assert len(texts) == main.instructions == 9
    assert "IADD3 R1, R1, 0x1, RZ" not in texts
    assert code.loads(main.blocks) == {16: 1}
    assert around.instructions == 4


def test_code_without_a_loop_is_taken_whole():
    code = sass.parse(MARCH.replace("BRA.U UP0, `(.L_x_1)", "NOP"))
    main, around = sass.main_and_around(code, products)
    assert main.instructions == 13
    assert around == sass.Path()


def test_a_loop_inside_counts_once_for_what_is_around_it():
    """An outer loop of 2 + 1 instructions around MARCH's."""
    text = MARCH.replace(".L_x_1:", ".L_x_0:\n /*0012*/ NOP ;\n.L_x_1:").replace(
        "LDL R4, [R1]", "BRA.U UP1, `(.L_x_0)"
    )
    code = sass.parse(text)
    assert len(code.loops) == 2
    main, around = sass.main_and_around(code, products)
    assert main.instructions == 9
    assert around.instructions == 2


MASKED = """
.L_x_6:
        /*0070*/              @P2 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   HGMMA.64x32x16.F32.BF16 R72, R120, gdesc[UR24].tnspB, R72 ;
        /*0090*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00a0*/              @P4 BRA `(.L_x_6) ;
"""


@pytest.fixture
def unrolled() -> str:
    """MARCH with two turns of an inner loop unrolled, where nothing is masked, and a loop of masked ones."""
    before, rest = MARCH.split(".L_x_2:\n")
    turn = next(line for line in before.splitlines() if "HGMMA" in line) + "\n"
    return before.replace(turn, 2 * turn) + ".L_x_2:\n" + MASKED + rest[rest.index(".L_x_3:") :]


def test_unrolled_turns_are_the_interior_beside_a_loop_of_masked_ones(unrolled):
    code = sass.parse(unrolled)
    assert len(code.loops) == 2
    main, around = sass.main_and_around(code, products)
    assert (main.turns, main.work, main.instructions) == (2, 2, 4)
    assert code.loads(main.blocks) == {16: 1}
    assert (around.work, around.stored, around.instructions) == (0, 8, 6)


def test_unrolled_turns_with_masks_are_not_the_interior(unrolled):
    longer = unrolled.replace("@P1 BRA `(.L_x_2) ;", "@P1 BRA `(.L_x_2) ;" + 5 * "\n /*0032*/ NOP ;")
    main, around = sass.main_and_around(sass.parse(longer), products)
    assert (main.turns, main.work, main.instructions) == (1, 1, 4)
    assert around.work == 0


def test_turns_peeled_off_a_loop_are_around_it(unrolled):
    peeled = unrolled.replace("BRA `(.L_x_3) ;", "NOP ;")
    main, around = sass.main_and_around(sass.parse(peeled), products)
    assert (main.turns, main.work) == (1, 1)
    assert around.work == 2


@pytest.mark.parametrize(
    ("text", "access"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", ("load", 16)),
        ("LDG.E R4, desc[UR4][R2.64]", ("load", 4)),
        ("LDG.E.U16 R4, desc[UR4][R2.64]", ("load", 2)),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", ("load", 16)),
        ("STG.E.64 desc[UR4][R2.64], R4", ("store", 8)),
        ("LDGDEPBAR", ("", 0)),
        ("LDS.128 R4, [R1]", ("", 0)),
    ],
)
def test_accesses_have_widths(text, access):
    assert sass.Instruction("", text).access == access


# The command, which compiles


SPILLS = """
from effseg.kernels import config, heuristics
heuristics._elementwise = lambda *_: config.Config("tile", block_w=256, block_n=32, splits=1024, num_warps=1)
"""
SPILLS_IN_CONVOLUTIONS = """
from effseg.kernels import config, heuristics
heuristics._conv = lambda *_: config.Config("slide", block_d=4, block_h=16, block_w=16, block_n=32)
"""
START = """
import sys
from effseg.inspection.__main__ import main
if __name__ == "__main__":
    sys.exit(main())
"""


def inspected(
    folder: Path, *arguments: str, before: str = ""
) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """The command in a process of its own, for kernels here are interpreted; and the rows that it wrote.

    `before` is what that process, and those that compile for it, execute first.
    """
    module = folder / "command.py"
    module.write_text(before + START)
    path = folder / "rows.json"
    command = [sys.executable, str(module), *arguments, "--json", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done, json.loads(path.read_text())["rows"]


Inspected = tuple[subprocess.CompletedProcess[str], dict[tuple[str, str], dict]]


@pytest.fixture(scope="module")
def inspection(tmp_path_factory, pytestconfig) -> Inspected:
    """Convolutions on sm_90, by operator and shape, and a fold that spills: two of 32 channels, or, where
    there is time, all of 16, 32 and 64. One process compiles the few, for each begins with imports."""
    pytest.importorskip("triton")
    slow = pytestconfig.getoption("--slow")
    shapes = ["16->16", "32->32", "64->64"] if slow else ["32->32"]
    operators = ["conv3d_fwd", "conv3d_dgrad", *(["conv3d_wgrad"] if slow else []), "fold"]
    selected = [*(f"{shape} 3x3x3 fused" for shape in shapes), "C64"]
    arguments = ["--arch", "sm_90", "--op", *operators, "--shape", *selected, "--jobs", "2" if slow else "1"]
    done, rows = inspected(tmp_path_factory.mktemp("inspect"), *arguments, before=SPILLS)
    assert len(rows) == (10 if slow else 3), done.stdout + done.stderr
    return done, {(row["op"], row["shape"].split("->")[0]): row for row in rows}


@pytest.fixture(scope="module")
def rows(inspection) -> dict[tuple[str, str], dict]:
    """Of the convolutions, whose configurations are the shipped ones."""
    return {name: row for name, row in inspection[1].items() if name[0] != "fold"}


BARS = {
    ("conv3d_fwd", "16"): 1150,
    ("conv3d_fwd", "32"): 2250,
    ("conv3d_fwd", "64"): 4100,
    ("conv3d_dgrad", "32"): 800,
    ("conv3d_wgrad", "16"): 1050,
    ("conv3d_wgrad", "32"): 2400,
    ("conv3d_wgrad", "64"): 6700,
}


QUICK = [("conv3d_fwd", "32"), ("conv3d_dgrad", "32")]


@pytest.mark.parametrize(
    ("which", "bar"),
    [pytest.param(*bar, marks=[] if bar[0] in QUICK else pytest.mark.slow) for bar in BARS.items()],
)
@pytest.mark.long
def test_main_loops_issue_few_instructions(rows, which, bar):
    assert 0 < rows[which]["issue"] <= bar


@pytest.mark.long
def test_issue_clocks_are_no_worse_than_the_guards_baseline(rows):
    version = pytest.importorskip("triton").__version__
    known = guard.read(guard.BASELINE).kernels
    if version not in known:
        pytest.skip(f"no baseline for Triton {version}")
    now = guard.clocks(row for row in rows.values() if row["shape"].startswith("32->32"))
    findings = guard.compare({name: known[version][name] for name in now}, now)
    assert [str(finding) for finding in findings if finding.is_worse] == []


@pytest.mark.long
def test_shipped_configurations_use_wgmma_and_do_not_spill(rows):
    for row in rows.values():
        assert row["fault"] == ""
        assert row["spills"] == 0
        assert row["mma"]["HGMMA"] > 0
        assert row["registers"] <= 255
        assert row["issue_all"] >= row["issue"]


@pytest.mark.long
def test_a_configuration_that_spills_is_a_fault(inspection):
    """And the only one: nothing else fails beside it."""
    done, rows = inspection
    row = rows["fold", "C64"]
    assert done.returncode == 1
    assert row["spills"] > 0
    assert [line for line in done.stderr.splitlines() if "sm_90" in line] == [
        f"fold: C64: sm_90: bf16: {row['fault']}"
    ]


@pytest.mark.slow
def test_rows_of_loads_are_wide(rows):
    assert rows["conv3d_fwd", "64"]["loads"].keys() == {"16"}


@pytest.mark.slow
def test_a_convolution_that_spills_is_a_fault(tmp_path):
    arguments = ["--arch", "sm_90", "--op", "conv3d_fwd", "--shape", "32->32 3x3x3 fused"]
    done, (row,) = inspected(tmp_path, *arguments, before=SPILLS_IN_CONVOLUTIONS)
    assert done.returncode == 1
    assert row["spills"] > 0
    assert f"conv3d_fwd: 32->32 3x3x3 fused: sm_90: bf16: {row['fault']}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--arch", "sm_70"], "sm_70"),
        (["--op", "conv4d"], "conv4d"),
        (["--dtype", "fp64"], "fp64"),
        (["--jobs", "0"], "--jobs"),
        (["--json", "."], "--json"),
        (["--shape", "no such shape"], "no such shape"),
        (["--what"], "--what"),
    ],
)
def test_bad_arguments_are_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        inspect.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_faults(architecture, tmp_path):
    done, rows = inspected(tmp_path, "--arch", architecture)
    assert done.returncode == 0, done.stderr
    assert {row["op"] for row in rows} == set(LOOPS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_dtypes_compile_without_faults(dtype, tmp_path):
    done, _ = inspected(tmp_path, "--quick", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
