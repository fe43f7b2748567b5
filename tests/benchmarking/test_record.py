"""Records: what is written is read again, and nothing else is."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from effseg.benchmarking import record
from effseg.benchmarking.record import Row
from effseg.errors import InputError

ROW = Row("memory", "unet3d/eager", "64x64x64, 15 classes", "bf16", bytes_predicted=1000, voxels=64**3)
ROWS = (ROW, replace(ROW, status="out of memory", reason="tried to allocate 1 TiB", bytes_predicted=None))


@pytest.fixture
def data() -> dict:
    return record.finish(record.begin(rounds=5), ROWS).to_dict()


def test_a_record_survives_its_file(tmp_path):
    written = record.finish(record.begin(rounds=5), ROWS)
    record.write(written, tmp_path / "new" / "record.json")
    assert record.read(tmp_path / "new" / "record.json") == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["record.json"]


def test_machine_and_versions_are_told(data):
    assert data["schema"] == record.SCHEMA
    assert data["conditions"] == {"rounds": 5}
    assert data["machine"]["cpu"]
    assert data["machine"]["threads"] == torch.get_num_threads()
    assert data["versions"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        gpu = ("gpu", "gpu_memory", "driver", "clocks_before", "clocks_after")
        assert {data["machine"][key] for key in gpu} == {None}
        assert data["versions"]["cudnn"] is None


def test_the_gpus_driver_and_clocks_are_asked_for(monkeypatch):
    class Properties:
        name, total_memory, uuid = "GPU X", 2**37, "1234"

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(record, "_output", lambda *command: asked.append(command) or "580.1, 1980, 2619")
    machine = record.machine()
    assert machine["gpu"] == "GPU X"
    assert machine["gpu_memory"] == 2**37
    assert machine["driver"] == "580.1"
    assert machine["clocks_before"] == "sm 1980, memory 2619"
    assert "--id=GPU-1234" in asked[0]


def test_a_commit_has_40_digits_and_a_mark_where_files_differ():
    commit = record.commit()
    assert commit is None or len(commit.removesuffix("+")) == 40


def test_what_is_not_a_number_is_not_written(tmp_path):
    bad = record.finish(record.begin(), [replace(ROW, seconds_p50=float("nan"))])
    with pytest.raises(ValueError, match="JSON"):
        record.write(bad, tmp_path / "record.json")
    assert list(tmp_path.iterdir()) == []


def changed(**changes) -> dict:
    return {"rows": [asdict(ROW) | changes]}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"schema": 2}, "schema: expected 1, got 2"),
        ({"machine": {"cpu": "x"}}, "machine: expected the keys cpu, threads"),
        ({"versions": None}, "versions: expected an object, got NoneType"),
        ({"conditions": []}, "conditions: expected an object"),
        ({"rows": {}}, "rows: expected a list"),
        ({"surprise": 1}, "surprise differ"),
        ({"rows": [1]}, r"rows\[0\]: expected an object, got int"),
        (changed(suite="speed"), r"rows\[0\].suite: expected one of memory, throughput, kernels"),
        (
            changed(status="slow"),
            r"rows\[0\].status: expected one of ok, skipped, out of memory, failed",
        ),
        (changed(status="skipped"), r"rows\[0\].reason: expected one"),
        (changed(macs=-1), r"rows\[0\].macs: expected a number of 0 or more, or null, got -1"),
        (changed(macs=True), r"rows\[0\].macs: expected a number"),
        (changed(contender=3), r"rows\[0\].contender: expected a text, got 3"),
        (changed(colour="red"), "colour differ"),
    ],
)
def test_what_is_wrong_is_named(data, tmp_path, changes, line):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(data | changes))
    with pytest.raises(InputError, match=line) as caught:
        record.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1", b"\xff\xfe", b"[]", b"3"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="expected a benchmark record"):
        record.read(path)
