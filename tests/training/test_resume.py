"""A run knows its data: what may change before it is continued, and what may not."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch

import effseg
from effseg import phantom
from effseg.data.cases import find_cases
from effseg.errors import InputError
from effseg.training import TrainingConfig, loop, train
from effseg.training.data import split
from effseg.training.distributed import World
from effseg.training.lock import locked
from effseg.training.records import read_rows

STEPS = 2


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return phantom.write_dataset(tmp_path_factory.mktemp("phantoms"), cases=6, shape=(16, 12, 12), unseen=0)


@pytest.fixture(scope="module")
def begun(phantoms, tmp_path_factory):
    """A run of one step, as a user's Ctrl-C leaves it."""
    run = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quiet(patch)
        once = loop.Stepper.__call__

        def call(self, number, *arguments):
            if number == 1:
                raise KeyboardInterrupt
            return once(self, number, *arguments)

        patch.setattr(loop.Stepper, "__call__", call)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(phantoms, run))
    return run


def quiet(patch):
    """Drawing and validation take longer than all steps of these runs."""
    for name in ("_overlay", "_draw_curves"):
        patch.setattr(loop._Run, name, lambda *arguments: None)


def make_config(data, run, **values):
    return TrainingConfig(
        data=data,
        output=run,
        model="effseg-tiny",
        crop="none",
        steps=STEPS,
        validation_interval=STEPS,
        checkpoint_interval=1,
        workers=0,
        augment=False,
        **values,
    )


@pytest.fixture
def data(phantoms, tmp_path):
    """The data set, for a test to change."""
    return shutil.copytree(phantoms, tmp_path / "data")


@pytest.fixture
def go_on(begun, data, tmp_path, monkeypatch):
    """Continues the run; returns what it printed."""
    quiet(monkeypatch)
    run = shutil.copytree(begun, tmp_path / "run")

    def go_on(**values):
        from io import StringIO

        from rich.console import Console

        screen = StringIO()
        train(make_config(data, run, **values), console=Console(file=screen, width=500))
        return screen.getvalue()

    go_on.run = run
    return go_on


def add_case(data, name, like="phantom_000"):
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(data / folder / f"{like}{ending}", data / folder / f"{name}{ending}")


def edit_json(data, edit):
    path = data / "dataset.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    edit(entries)
    path.write_text(json.dumps(entries), encoding="utf-8")


def edit_labels(data, edit):
    def change(entries):
        entries["labels"] = dict(edit(name, value) for name, value in entries["labels"].items())

    edit_json(data, change)


def test_what_is_recorded(begun, phantoms):
    record = json.loads((begun / "data.json").read_text(encoding="utf-8"))
    assert record["labels"]["names"] == list(phantom.NAMES)
    assert sorted(record["training"] + record["validation"]) == [f"phantom_00{i}" for i in range(6)]
    assert len(record["validation"]) == 2
    assert sorted(record["files"]) == sorted(record["training"] + record["validation"])
    assert record["global_batch"] == 1
    size = (phantoms / "imagesTr" / "phantom_003_0000.nii.gz").stat().st_size
    assert record["files"]["phantom_003"]["images"][0]["bytes"] == size


def test_the_same_split_goes_on_whatever_is_added(go_on, data):
    before = json.loads((go_on.run / "data.json").read_text(encoding="utf-8"))
    for name in ("aaa", "zzz"):
        add_case(data, name)
    parts = split(make_config(data, go_on.run))
    assert [[case.name for case in part] for part in parts] == [before["training"], before["validation"]]
    printed = go_on()
    assert "stay out of it: aaa, zzz" in printed
    assert json.loads((go_on.run / "data.json").read_text(encoding="utf-8")) == before
    assert len(read_rows(go_on.run / "progress.csv")) == STEPS


def test_a_split_that_has_changed_is_told(go_on, data):
    names = [case.name for case in find_cases(data, labelled=True)]
    splits = [{"train": names[:3], "val": names[3:]}]
    (data / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8")
    assert "splits_final.json has put" in go_on()


def test_a_scan_that_trains_and_validates_is_told(data, tmp_path, monkeypatch, capsys):
    quiet(monkeypatch)
    add_case(data, "copy")
    config = make_config(data, tmp_path / "run", validation="copy")
    from rich.console import Console

    train(config, console=Console(width=500))
    assert "validation case copy is the same scan as training case phantom_000" in capsys.readouterr().out


def test_folders_and_times_may_change(go_on, data):
    os.utime(data / "imagesTr" / "phantom_000_0000.nii.gz", (1, 1))
    assert "continues after step 1" in go_on()


def rewrite(path, edit):
    volume = nib.load(path)
    nib.save(nib.Nifti1Image(edit(np.asarray(volume.dataobj).copy()), volume.affine), path)


def gone(data):
    (data / "imagesTr" / "phantom_002_0000.nii.gz").unlink()
    (data / "labelsTr" / "phantom_002.nii.gz").unlink()


def dangling(data):
    path = data / "imagesTr" / "phantom_002_0000.nii.gz"
    path.unlink()
    path.symlink_to("/mnt/nas/gone.nii.gz")


def relabelled(data):
    rewrite(data / "labelsTr" / "phantom_002.nii.gz", lambda array: np.where(array == 1, 2, array))


def rescanned(data):
    rewrite(data / "imagesTr" / "phantom_002_0000.nii.gz", lambda array: array + 1)


def one_class_more(data):
    edit_json(data, lambda entries: entries["labels"].update(tumour=99))


def another_value(data):
    edit_labels(data, lambda name, value: (name, 99 if value == 3 else value))


def no_ct(data):
    edit_json(data, lambda entries: entries["channel_names"].update({"0": "MR"}))


def exchanged(data):
    names = {phantom.NAMES[1]: phantom.NAMES[2], phantom.NAMES[2]: phantom.NAMES[1]}
    edit_labels(data, lambda name, value: (names.get(name, name), value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gone, r"cases that are gone: phantom_002 \(removed\)"),
        (dangling, r"cases that are gone: phantom_002 \(.*a link to /mnt/nas/gone"),
        (relabelled, r"cases have changed: phantom_002 \(labels\)"),
        (rescanned, r"cases have changed: phantom_002 \(scan\)"),
        (one_class_more, r"11 classes .* now there are 12"),
        (another_value, r"another label map: .* was 3 and is 99"),
        (exchanged, r"another label map: .* was 1 and is 2"),
        (no_ct, r"a run with window = \(-200.0, 400.0\), but now it is \(None,\)"),
    ],
)
def test_what_has_changed_is_refused(go_on, data, change, message):
    files = {path: path.read_bytes() for path in go_on.run.rglob("*") if path.is_file()}
    change(data)
    with pytest.raises(InputError, match=message) as error:
        go_on(allow_missing=True)
    assert "begin anew" in str(error.value)
    assert "\n" not in str(error.value)
    left = {path: path.read_bytes() for path in go_on.run.rglob("*") if path.is_file()}
    assert {path: left[path] for path in files} == files


def test_a_renamed_organ_goes_on_under_its_new_name(go_on, data):
    edit_labels(data, lambda name, value: ("Leber (größer)" if name == "liver" else name, value))
    printed = go_on()
    assert "liver is called Leber (größer) now" in printed
    rows = read_rows(go_on.run / "progress.csv")
    assert len(rows) == STEPS
    assert "dice_Leber (größer)" in rows[0]
    for name in ("best", "final"):
        names = effseg.load(go_on.run / f"{name}.safetensors").extra["labels"]["names"]
        assert "Leber (größer)" in names
        assert "liver" not in names
    assert "is called" not in go_on()


def test_a_run_of_an_earlier_version_is_refused(go_on):
    (go_on.run / "data.json").unlink()
    with pytest.raises(InputError, match=r"a run of an earlier version, .* begin anew"):
        go_on()


def test_another_number_of_volumes_a_step_is_refused(go_on):
    """With --epochs it would end early, as done."""
    files = {path: path.read_bytes() for path in go_on.run.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=r"a run of 1 volumes a step .* go on with 1 process of batch_size 1"
    ):
        go_on(batch_size=2)
    assert {path: path.read_bytes() for path in files} == files


def test_a_run_that_did_not_record_its_volumes_a_step_goes_on(go_on):
    path = go_on.run / "data.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["global_batch"]
    path.write_text(json.dumps(record), encoding="utf-8")
    assert "continues after step 1" in go_on()
    assert json.loads(path.read_text(encoding="utf-8"))["global_batch"] == 1


def test_a_record_alone_is_no_run(phantoms, begun, tmp_path, monkeypatch):
    """A process was killed between the record and the configuration."""
    quiet(monkeypatch)
    (tmp_path / "run").mkdir()
    shutil.copy(begun / "data.json", tmp_path / "run" / "data.json")
    assert len(train(make_config(phantoms, tmp_path / "run")).losses) == STEPS


def test_bad_data_does_not_cost_the_run_to_be_overwritten(go_on, data, tmp_path):
    (data / "imagesTr" / "phantom_002_0000.nii.gz").unlink()
    with pytest.raises(InputError, match="phantom_002"):
        train(make_config(data, go_on.run), overwrite=True)
    assert list((go_on.run / "checkpoints").iterdir())
    assert (go_on.run / "progress.csv").stat().st_size


class TestMissing:
    def test_left_out_where_allowed(self, data, tmp_path, monkeypatch, capsys):
        quiet(monkeypatch)
        (data / "imagesTr" / "phantom_001_0000.nii.gz").unlink()
        path = data / "imagesTr" / "phantom_003_0000.nii.gz"
        path.write_bytes(path.read_bytes()[:500])  # cut while it was copied
        config = make_config(data, tmp_path / "run", fold="all")
        with pytest.raises(InputError, match=r"the scan of these labels is missing.*--allow-missing"):
            train(config)
        (data / "labelsTr" / "phantom_001.nii.gz").unlink()
        with pytest.raises(InputError, match="numTraining is 6, found 5 cases"):
            train(config)
        edit_json(data, lambda entries: entries.update(numTraining=5))
        with pytest.raises(InputError, match=r"phantom_003_0000\.nii\.gz: damaged.*--allow-missing"):
            train(config)
        add_case(data, "phantom_001")
        (data / "labelsTr" / "phantom_001.nii.gz").unlink()
        train(config.replace(allow_missing=True))
        record = json.loads((config.output / "data.json").read_text(encoding="utf-8"))
        assert record["training"] == ["phantom_000", "phantom_002", "phantom_004", "phantom_005"]
        train(config)  # a run goes on without what it began without
        named = config.replace(output=tmp_path / "named", cases="phantom_000,phantom_001", allow_missing=True)
        train(named)
        train(named)

    def test_cases_of_the_fold(self, data, tmp_path):
        names = [case.name for case in find_cases(data, labelled=True)]
        splits = [{"train": [*names[:4], "c7"], "val": [*names[4:], "c9"]}]
        (data / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8")
        config = make_config(data, tmp_path / "run")
        with pytest.raises(InputError, match=r"case 'c7' of the fold is not there; .*'c9'"):
            train(config)
        assert [len(part) for part in split(config.replace(allow_missing=True))] == [4, 2]
        assert [len(part) for part in split(config.replace(cases=f"{names[0]},{names[5]}"))] == [1, 1]

    def test_cases_that_are_not_asked_for_do_not_matter(self, data, tmp_path):
        dangling(data)
        config = make_config(
            data, tmp_path / "run", cases="phantom_000,phantom_001", validation="phantom_005"
        )
        assert [len(part) for part in split(config)] == [2, 1]
        with pytest.raises(InputError, match="phantom_002_0000"):
            split(config.replace(cases="phantom_00[0-2]"))


class TestInit:
    def test_begins_with_given_weights(self, begun, data, tmp_path, monkeypatch):
        quiet(monkeypatch)
        weights = next((begun / "checkpoints").iterdir()) / "model.safetensors"
        own = tmp_path / "weights.safetensors"
        shutil.copy(weights, own)
        seen = []
        monkeypatch.setattr(loop, "take_weights", lambda *args: seen.append(args) or "begins")
        config = make_config(data, tmp_path / "run", init=own)
        train(config)
        assert [args[1] for args in seen] == [own]
        own.unlink()  # a run that has begun needs it no more
        train(config)
        train(config.replace(init=None))
        assert len(seen) == 1
        with pytest.raises(InputError, match="no such checkpoint"):
            train(config.replace(init=tmp_path / "other.safetensors"))
        train(config.replace(init=weights))  # the same weights in another place
        other = tmp_path / "another.safetensors"
        effseg.EffSegNet(1, 3, preset="tiny").save(other)
        with pytest.raises(
            InputError, match=r"that began with .*weights\.safetensors, but now it is .*another"
        ):
            train(config.replace(init=other))

    def test_a_run_without_cannot_get_some(self, go_on, begun, tmp_path):
        weights = next((begun / "checkpoints").iterdir()) / "model.safetensors"
        with pytest.raises(InputError, match="began without --init"):
            go_on(init=weights)

    def test_not_out_of_its_own_folder(self, begun):
        with pytest.raises(InputError, match=r"^init: expected weights outside of the output"):
            make_config("data", begun, init=begun / "final.safetensors")
        with pytest.raises(InputError, match=r"^init: "):
            make_config("data", begun, init=begun)


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_a_killed_process_leaves_no_lock(go_on):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(go_on.run / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        files = {path: path.read_bytes() for path in go_on.run.rglob("*") if path.is_file()}
        for overwrite in (False, True):
            with pytest.raises(InputError, match="another process is training in this folder"):
                train(make_config("nowhere", go_on.run), overwrite=overwrite)
        assert files == {path: path.read_bytes() for path in go_on.run.rglob("*") if path.is_file()}
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    go_on()


def test_a_lock_is_of_one_run_at_a_time(tmp_path):
    world, said = World(0, 1, torch.device("cpu")), []
    with locked(tmp_path / "run", world, said.append):
        with pytest.raises(InputError, match="another process"), locked(tmp_path / "run", world, said.append):
            pytest.fail("two at once")
        with locked(tmp_path / "other", world, said.append):
            pass
    with locked(tmp_path / "run", world, said.append):
        pass
    assert said == []


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    said = []
    with locked(tmp_path, World(0, 1, torch.device("cpu")), said.append):
        assert "cannot be locked (Operation not supported)" in said[0]


@pytest.mark.slow
def test_of_two_starts_one_is_refused(data, tmp_path):
    """Ten times; the records of the one that goes on are whole."""
    for number in range(10):
        run = tmp_path / f"run{number}"
        command = [sys.executable, "-m", "effseg", "train", "--data", str(data), "--output", str(run)]
        command += ["--steps", "3", "--model", "effseg-tiny", "--device", "cpu", "--no-augment"]
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
            if not time.sleep(0.05 * number)
        ]
        errors = [process.communicate()[1] for process in processes]
        codes = [process.returncode for process in processes]
        assert sorted(codes) == [0, 2], errors
        refused = errors[codes.index(2)]
        assert refused.count("\n") == 1
        assert "another process is training in this folder" in refused
        assert [int(row["step"]) for row in read_rows(run / "progress.csv")] == [1, 2, 3]
