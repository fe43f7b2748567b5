"""Which labels change places in a mirrored volume: told by the user or the data set, never by a name."""

import json
from pathlib import Path

import pytest

from effseg.data.labels import load_label_map
from effseg.data.mirroring import described_pairs, mirror_pairs
from effseg.errors import InputError

NAMES = ("background", "parotid_left", "parotid_right", "Auge li", "Auge re", "liver")


@pytest.mark.parametrize(
    ("given", "described", "pairs"),
    [
        ("parotid_left:parotid_right", None, ((1, 2),)),
        (" parotid_left : parotid_right , Auge re:Auge li ", [["liver", "x"]], ((1, 2), (4, 3))),
        ('[["parotid_left", "parotid_right"]]', None, ((1, 2),)),
        ("none", [["parotid_left", "parotid_right"]], ()),
        (None, [], ()),
        (None, [["Auge li", "Auge re"], ["kidney L", "kidney R"]], ((3, 4),)),
    ],
)
def test_pairs(given, described, pairs):
    assert mirror_pairs(NAMES, given, described, ("kidney R", "kidney L", "spleen")) == pairs


@pytest.mark.parametrize(
    ("given", "described", "message"),
    [
        (None, None, "--mirror-pairs A:B"),
        ("parotid_left:parotid", None, "labels that are learnt .*got 'parotid'"),
        ("parotid_left", None, "expected pairs of two names"),
        ("parotid_left:parotid_right:liver", None, "expected pairs of two names"),
        ("parotid_left:parotid_left", None, "'parotid_left' twice"),
        ("parotid_left:liver,liver:parotid_right", None, "'liver' twice"),
        ("background:liver", None, "got 'background'"),
        ("", None, "expected pairs of two names"),
        ("[1", None, "not readable as JSON"),
        (None, [["parotid_left", "kidney"]], "got 'kidney'"),
        (None, ["parotid_left"], "expected pairs of two names"),
        (None, "parotid_left:parotid_right", "expected a list of pairs of two names"),
        (None, {"parotid_left": "parotid_right"}, "expected a list of pairs of two names"),
        (None, [["Parotid_left", "Parotid_right"]], "got 'Parotid_left'"),  # a rename that was forgotten here
    ],
)
def test_refused(given, described, message):
    with pytest.raises(InputError, match=message):
        mirror_pairs(NAMES, given, described)


def test_one_spelling_of_an_umlaut():
    assert mirror_pairs(("background", "Drüse li", "Drüse re"), "Dru\u0308se li:Dru\u0308se re", None) == (
        (1, 2),
    )


@pytest.mark.parametrize("name", ["labels.json", "dataset.json"])
def test_the_data_set_says_them(tmp_path: Path, name: str) -> None:
    pairs = [["Niere L", "Niere R"]]
    labels = {"0": "background", "1": "Niere L", "2": "Niere R"}
    entries = labels if name == "labels.json" else {"labels": {v: int(k) for k, v in labels.items()}}
    text = json.dumps(entries | {"mirror_pairs": pairs})
    (tmp_path / name).write_text(text, encoding="utf-8-sig")  # some editors write a byte order mark
    assert described_pairs(tmp_path) == pairs
    assert load_label_map(tmp_path).names == ("background", "Niere L", "Niere R")


def test_the_data_set_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"1": "liver", "2": "mirror_pairs"}')
    assert described_pairs(tmp_path) is None
    assert load_label_map(tmp_path).names == ("background", "liver", "mirror_pairs")
