"""What the study of accuracy makes of its runs: intervals, tables, learning curves."""

import json

import numpy as np
import pytest

from benchmarks.accuracy import curves, report
from benchmarks.accuracy.intervals import DIFFERENCE, bootstrapped, mean_over_patients
from benchmarks.accuracy.runs import mean_dice
from benchmarks.accuracy.studies import SEARCH
from effseg.errors import InputError

# Intervals


def test_an_interval_of_two_patients_is_known():
    """Student's law with one degree of freedom is Cauchy's, whose quantile of 3/4 is 1."""
    assert mean_over_patients([0.25, 0.75], level=0.5) == pytest.approx((0.5, 0.25, 0.75))
    half = 0.25 * np.tan(0.475 * np.pi)
    assert mean_over_patients([0.25, 0.75], (-9.0, 9.0)) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_an_interval_ends_where_a_mean_of_dice_can_lie():
    assert mean_over_patients([0.25, 0.75]) == (0.5, 0.0, 1.0)
    assert mean_over_patients([0.25, 0.75], DIFFERENCE) == (0.5, -1.0, 1.0)


@pytest.mark.parametrize("patients", [2, 4, 16])
def test_an_interval_of_few_patients_holds_the_true_mean_as_often_as_it_says(patients):
    """Percentiles of bootstrapped means do so in 50, 80 and 92 % of the cases."""
    rng, cases, held = np.random.default_rng(1), 4000, 0
    for values in rng.normal(0.05, 0.02, (cases, patients)):
        _, low, high = mean_over_patients(values, DIFFERENCE)
        held += low <= 0.05 <= high
    assert held / cases == pytest.approx(0.95, abs=0.012)  # 3.5 standard deviations


def test_one_patient_has_no_interval():
    """And not one of no width, as if nothing were uncertain."""
    assert mean_over_patients([0.5]).text() == "0.500 (one patient)"
    assert mean_over_patients([0.5], DIFFERENCE).text("+") == "+0.500 (one patient)"


def test_an_interval_of_many_patients_is_that_of_the_normal_law():
    values = np.random.default_rng(1).normal(0.8, 0.1, 400)
    found = mean_over_patients(values)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.01 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01 * half)


def test_pairs_cancel_what_patients_have_in_common():
    hard = np.array([0.1, 0.5, 0.9])
    assert mean_over_patients((hard + 0.25) - hard) == pytest.approx((0.25, 0.25, 0.25))


def test_a_bootstrapped_interval_lies_between_draws_of_patients():
    """Of 0 and 1 a quarter of the draws are both 0, and a quarter both 1."""
    assert bootstrapped([0.0, 1.0]) == (0.5, 0.0, 1.0)
    assert bootstrapped([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)
    assert bootstrapped([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)
    assert bootstrapped([0.5]).interval() == "one patient"


def test_a_bootstrapped_interval_of_many_patients_is_that_of_the_normal_law():
    values = np.random.default_rng(1).normal(0.05, 0.1, 400)
    found, half = bootstrapped(values), 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.06 * half)


@pytest.mark.parametrize("interval", [mean_over_patients, bootstrapped])
@pytest.mark.parametrize("values", [[], [0.5, np.nan], [[0.5]]])
def test_what_has_no_interval_is_refused(values, interval):
    with pytest.raises(InputError, match="values: expected one finite number a patient"):
        interval(values)


# Tables


def test_tables_pair_seeds_and_patients(tmp_path):
    """Base is 0.25 ahead on every patient, by both seeds; the third network has run once."""
    dice = {"easy": 0.7, "hard": 0.3}
    for name, ahead, seeds in (("effseg-base", 0.25, (1, 2)), ("unet3d", 0.0, (1, 2)), ("nnunet", 0.0, (2,))):
        for seed in seeds:
            patients = {
                patient: {"liver": value + ahead + seed / 100, "spleen": None}
                for patient, value in dice.items()
            }
            write(tmp_path, name, seed, patients)
    write(tmp_path, "unet3d", 9, {"easy": {"liver": 1.0, "spleen": None}}, fold=SEARCH)
    whole, organs, search = report.tables(tmp_path)
    assert whole.title == "two phantoms, 200 whole-volume steps each; bf16, 1 thread, Some CPU"
    rows = {row[0]: row[1:] for row in whole.rows}
    assert rows["EffSegNet base"] == (
        "2", "200", "60", "0.001", "0.765 (0.000 to 1.000)", "0.760 to 0.770", "-", "-"
    )  # fmt: skip
    assert rows["3D U-Net (Cicek 2016)"][-2:] == ("+0.250 (+0.250 to +0.250)", "+0.250 to +0.250")
    assert rows["nnU-Net PlainConvUNet"][0] == "1"
    assert rows["nnU-Net PlainConvUNet"][-2] == "+0.250 (+0.250 to +0.250), 1 run"
    assert organs.rows == (
        ("liver", "0.765", "0.515", "0.520"), ("spleen", "in none", "in none", "in none")
    )  # fmt: skip
    assert (search.columns, search.rows) == (("network", "0.001"), (("3D U-Net (Cicek 2016)", "1.000"),))
    assert "| **EffSegNet base** |" in report.markdown(tmp_path)


def test_runs_of_several_machines_stand_in_one_table_with_times_apart(tmp_path):
    """Seed 2 of base ran elsewhere, as did the only run of the 3D U-Net."""
    for name, seed, cpu, dice in (
        ("effseg-base", 1, "Slow CPU", 0.5),
        ("effseg-base", 2, "Fast CPU", 0.75),
        ("unet3d", 1, "Fast CPU", 0.25),
    ):
        write(tmp_path, name, seed, {"one": {"liver": dice}}, cpu=cpu, seconds=100.0 * len(cpu) + seed)
    whole, _ = report.tables(tmp_path)
    assert whole.title.endswith("; bf16, 1 thread, Fast CPU and Slow CPU")
    ours, theirs = whole.rows
    assert ours[3:] == (
        "802 (Fast CPU), 801 (Slow CPU)", "0.001", "0.625 (one patient)", "0.500 to 0.750", "-", "-"
    )  # fmt: skip
    assert (theirs[3], theirs[-2]) == ("801 (Fast CPU)", "+0.250 (one patient), 1 run")


def test_seeds_are_told_apart_over_all_folds(tmp_path):
    """One and the same seed scores 0.9 on one fold's patient and 0.5 on the other's, another one 0.1 less; a
    third has not run the hard one."""
    for seed, fold, patient, dice in (
        (1, "0", "easy", 0.9), (1, "1", "hard", 0.5), (2, "0", "easy", 0.8), (2, "1", "hard", 0.4),
        (3, "0", "easy", 0.9),
    ):  # fmt: skip
        write(tmp_path, "effseg-base", seed, {patient: {"liver": dice}}, fold=fold)
    write(tmp_path, "unet3d", 1, {"easy": {"liver": 0.9}}, fold="0")
    write(tmp_path, "unet3d", 2, {"hard": {"liver": 0.5}}, fold="1")
    whole, _ = report.tables(tmp_path)
    assert [row[6] for row in whole.rows] == ["0.600 to 0.700", "0.900 to 0.900"]


def test_means_over_fewer_patients_say_so(tmp_path):
    """nnU-Net's network has run the fold of the easy patient alone, and has not scored more than base."""
    write(tmp_path, "effseg-base", 1, {"easy": {"liver": 0.9}}, fold="0")
    write(tmp_path, "effseg-base", 2, {"easy": {"liver": 0.9}}, fold="0")
    write(tmp_path, "effseg-base", 1, {"hard": {"liver": 0.3}}, fold="1")
    write(tmp_path, "nnunet", 1, {"easy": {"liver": 0.8}}, fold="0")
    whole, organs = report.tables(tmp_path)
    ours, theirs = (row[5] for row in whole.rows)
    assert ours.startswith("0.600 (")
    assert theirs == "0.800 (one patient), 1 of 2 patients"
    assert whole.rows[1][-2] == "+0.100 (one patient), 1 run"
    assert organs.columns == ("organ", "EffSegNet base", "nnU-Net PlainConvUNet, 1 of 2 patients")
    assert organs.rows == (("liver", "0.600", "0.800"),)  # who has more seeds does not count more


def test_a_patient_who_shows_no_organ_is_left_out(tmp_path):
    patients = {"one": {"liver": 0.5}, "two": {"liver": 0.75}, "empty": {"liver": None}}
    for name in ("effseg-base", "unet3d"):
        write(tmp_path, name, 1, patients)
    whole, _ = report.tables(tmp_path)
    assert [row[5][:5] for row in whole.rows] == ["0.625", "0.625"]
    assert whole.rows[1][-2] == "+0.000 (+0.000 to +0.000)"
    assert mean_dice(patients) == 0.625
    assert np.isnan(mean_dice({"empty": {"liver": None}}))


def test_other_patients_are_no_pairs(tmp_path):
    write(tmp_path, "effseg-base", 1, {"one": {"liver": 0.9}})
    write(tmp_path, "unet3d", 1, {"two": {"liver": 0.5}})
    with pytest.raises(InputError, match="effseg-base and unet3d have scored other patients: fold 0, seed 1"):
        report.tables(tmp_path)


def test_two_files_of_one_run_are_refused(tmp_path):
    """Such as those of two machines, of which one alone would count, or both twice."""
    for folder, dice in (("here", 0.9), ("there", 0.1)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "effseg-base", 1, {"one": {"liver": dice}}, curve=[[1, 0.1], [2, 0.2]])
    for found in (report.tables, lambda folder: list(curves.figures(folder))):
        with pytest.raises(InputError, match=r"there.*: the same run as .*here.*: keep one of them"):
            found(tmp_path)


def test_what_a_kill_left_is_no_run(tmp_path):
    write(tmp_path, "effseg-base", 1, {"one": {"liver": 0.9}})
    whole = tmp_path / "effseg-base_fold-0_seed-1.json"
    (tmp_path / ".writing-ab_cd.json").write_text(whole.read_text())
    (tmp_path / ".writing-ef_gh.json").write_text(whole.read_text()[:50])
    assert report.tables(tmp_path)[0].rows[0][1] == "1"


def test_curves_of_several_arithmetics_are_apart(tmp_path):
    for folder, dtype, dice in (("one", "bf16", 0.25), ("other", "fp32", 0.75)):
        (tmp_path / folder).mkdir()
        options = {"curve": [[1, 0.1], [2, dice]], "dtype": dtype}
        write(tmp_path / folder, "effseg-base", 1, {"one": {"liver": dice}}, **options)
    drawn = dict(curves.figures(tmp_path))
    names = [f"curves_phantoms_folds_steps-200_{dtype}-1-thread.png" for dtype in ("bf16", "fp32")]
    assert list(drawn) == names
    assert [len(figure.axes[0].lines) for figure in drawn.values()] == [2, 2]


def test_searches_of_several_arithmetics_are_apart(tmp_path):
    for folder, dtype, dice in (("one", "bf16", 0.25), ("other", "fp32", 0.75)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "unet3d", 1, {"one": {"liver": dice}}, fold=SEARCH, dtype=dtype, mean=dice)
    found = {table.title.rpartition("; ")[2]: table.rows for table in report.tables(tmp_path)}
    name = "3D U-Net (Cicek 2016)"
    assert found == {"bf16, 1 thread": ((name, "0.250"),), "fp32, 1 thread": ((name, "0.750"),)}


def test_curves_of_several_machines_have_the_times_of_the_race(tmp_path):
    """One and two minutes a step there, whatever each took on its machine; none without a race."""
    curve = [[1, 0.1], [2, 0.2]]
    for name, cpu in (("effseg-base", "Slow CPU"), ("unet3d", "Fast CPU")):
        write(tmp_path, name, 1, {"one": {"liver": 0.5}}, curve=curve, cpu=cpu)
    ((_, figure),) = curves.figures(tmp_path)
    assert [axes.get_xlabel() for axes in figure.axes] == ["steps"]
    (tmp_path / "phantoms").mkdir()
    race = {"seconds_per_step": {"effseg-base": 60, "unet3d": 120}}
    (tmp_path / "phantoms" / "paces.json").write_text(json.dumps(race))
    ((_, figure),) = curves.figures(tmp_path)
    by_time = [line.get_xdata().tolist() for line in figure.axes[1].lines]
    assert by_time[1::2] == [[1, 2], [2, 4]]
    assert figure.axes[1].get_xlabel() == "processor time of training, by the race, minutes"


def test_learning_curves_show_runs_and_their_means(tmp_path):
    """Against steps and minutes: a run of 200 steps in 60 s takes 0.25 of them for its first 50."""
    patients = {"easy": {"liver": 0.5}}
    for seed, dice in ((1, 0.2), (2, 0.4)):
        write(tmp_path, "effseg-base", seed, patients, curve=[[50, dice], [200, dice + 0.5]])
    write(tmp_path, "unet3d", 1, patients, curve=[[200, 0.1]])  # which is no curve
    write(tmp_path, "unet3d", 1, patients, fold="held", curve=[[100, 0.1], [200, 0.2]])
    (name, figure), (held, _) = curves.figures(tmp_path)
    assert (name, held) == ("curves_phantoms_folds_steps-200.png", "curves_phantoms_held_steps-200.png")
    by_steps, by_time = ([line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes)
    assert [line[0] for line in by_steps] == [[50, 0.2], [50, 0.4], [50, pytest.approx(0.3)]]
    assert by_time[2] == [[0.25, pytest.approx(0.3)], [1.0, pytest.approx(0.8)]]
    assert [text.get_text() for text in figure.axes[1].texts] == ["EffSegNet base, 0.800"]


def write(
    folder, name, seed, patients, fold="0", curve=(), cpu="Some CPU", seconds=60.0, dtype="bf16", mean=1.0
):
    document = {
        "schema": 1, "machine": {"cpu": cpu, "gpu": None}, "study": "phantoms",
        "title": "two phantoms", "contender": name,
        "budget": {"kind": "steps", "amount": 200}, "fold": fold, "seed": seed, "learning_rate": 1e-3,
        "steps": 200, "dtype": dtype, "device": "cpu", "threads": 1,
        "processor_seconds": seconds, "patients": patients, "mean_dice": mean,
        "curve": curve,
    }  # fmt: skip
    (folder / f"{name}_fold-{fold}_seed-{seed}.json").write_text(json.dumps(document))


def test_files_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "a_b.json").write_text("{}")
    with pytest.raises(InputError, match="expected a run of schema 1"):
        report.tables(tmp_path)
