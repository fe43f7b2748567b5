import math

import pytest

from effseg.training.records import Records, mean_dice, read_rows

HEADER = "step,epoch,seconds,learning_rate,loss,gradient_norm,dice_mean,dice_liver,dice_left kidney"


def write(folder, steps, done=0):
    records = Records(folder, ["liver", "left kidney"], done)
    for step in steps:
        records.add(step, 1, 0.5 * step, 1e-3, 1 / step, 0.25, [0.5, math.nan] if step % 2 == 0 else None)
    records.close()


def test_columns_and_numbers(tmp_path):
    write(tmp_path, range(1, 4))
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    assert lines[0] == HEADER
    assert lines[1] == "1,1,0.50,0.001,1.0,0.25,,,"
    assert lines[2] == "2,1,1.00,0.001,0.5,0.25,0.5,0.5,nan"
    assert float(read_rows(tmp_path / "progress.csv")[2]["loss"]) == 1 / 3
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_continuation_drops_the_rows_behind_its_checkpoint(tmp_path):
    write(tmp_path, range(1, 8))
    with (tmp_path / "progress.csv").open("a") as file:
        file.write("1")  # the start of row 12, cut by a kill: no row 1
    write(tmp_path, range(6, 9), done=5)
    assert [int(row["step"]) for row in read_rows(tmp_path / "progress.csv")] == list(range(1, 9))


def test_a_new_run_begins_with_an_empty_table(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, range(1, 2))
    assert [row["step"] for row in read_rows(tmp_path / "progress.csv")] == ["1"]


def test_mean_leaves_absent_organs_out():
    assert mean_dice([0.25, math.nan, 0.75]) == pytest.approx(0.5)
    assert math.isnan(mean_dice([math.nan]))
