"""What an organ is called changes no number."""

import json
import shutil

import numpy as np
import pytest

from effseg import phantom
from effseg.training import TrainingConfig, loop, train

SIDES = {
    "English": ("kidney left", "kidney right"),
    "German": ("Niere links", "Niere rechts"),
    "French": ("rein gauche", "rein droit"),
    "Italian": ("rene sinistro", "rene destro"),
    "Polish": ("nerka lewa", "nerka prawa"),
    "Japanese": ("左腎", "右腎"),
    "L/R": ("Kidney_L", "Kidney_R"),
    "li/re": ("Niere li", "Niere re"),
    "sin/dex": ("ren sin", "ren dex"),
    "lh/rh": ("ctx-lh", "ctx-rh"),
    "none": ("organ 1", "organ 2"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return phantom.write_dataset(
        tmp_path_factory.mktemp("names") / "data", cases=5, shape=(12, 10, 8), unseen=0
    )


def losses(data, output, names, **values):
    folder = shutil.copytree(data, output.with_name(output.name + "-data"))
    path = folder / "dataset.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    values_of = list(entries["labels"].values())
    others = [f"organ {value}" for value in values_of[3:]]
    entries["labels"] = dict(zip(["background", *names, *others], values_of, strict=True))
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    config = TrainingConfig(
        data=folder,
        output=output,
        model="effseg-tiny",
        crop="none",
        fold="all",
        steps=3,
        workers=0,
        seed=3,
        **values,
    )
    return train(config).losses


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for name in ("_overlay", "_draw_curves"):
        monkeypatch.setattr(loop._Run, name, lambda *arguments: None)


@pytest.mark.parametrize(
    "keys",
    [("English", "German", "Japanese", "none"), pytest.param(tuple(SIDES), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_the_same_losses_in_every_language(keys, data, tmp_path):
    found = {key: losses(data, tmp_path / str(i), SIDES[key]) for i, key in enumerate(keys)}
    assert all(np.isfinite(found["English"]))
    assert {key: value == found["English"] for key, value in found.items()} == dict.fromkeys(keys, True)


def test_mirrored_where_asked_for(data, tmp_path):
    names = SIDES["German"]
    plain = losses(data, tmp_path / "plain", names)
    options = {"mirror": "left-right", "mirror_pairs": f"{names[0]}:{names[1]}"}
    mirrored = losses(data, tmp_path / "mirrored", names, **options)
    alone = losses(data, tmp_path / "alone", names, mirror="left-right", mirror_pairs="none")
    assert plain != mirrored != alone != plain
