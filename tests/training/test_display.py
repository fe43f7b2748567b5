import io

import pytest
import torch
from rich.console import Console

from effseg.training import display
from effseg.training.display import Display, duration, peak_memory

CPU = torch.device("cpu")


def show(console):
    with Display(console, steps=4, first=1, device=CPU) as shown:
        shown.step(2, epoch=1, loss=0.5)
        shown.step(3, epoch=2, loss=1.5)
        shown.validation(3, ["liver", "left kidney"], [0.25, 0.75])
        shown.step(4, epoch=2, loss=1.0)


def test_a_file_gets_few_plain_lines():
    text = io.StringIO()
    show(Console(file=text, width=40))
    lines = text.getvalue().splitlines()
    assert lines[0] == "step 3/4  validation Dice 0.500  (liver 0.250  left kidney 0.750)"
    assert lines[1].startswith("step 4/4  epoch 2  loss 1.0000  Dice 0.500  peak ")
    assert lines[1].endswith("GiB  0:00:00 left")
    assert len(lines) == 2


def test_lines_come_at_intervals(monkeypatch):
    monkeypatch.setattr(display, "LINE_EVERY", 0.0)
    text = io.StringIO()
    show(Console(file=text))
    assert [line[:8] for line in text.getvalue().splitlines()] == [
        "step 2/4",
        "step 3/4",
        "step 3/4",
        "step 4/4",
    ]


def test_a_terminal_gets_a_live_line():
    text = io.StringIO()
    show(Console(file=text, force_terminal=True, width=120))
    assert "\x1b[" in text.getvalue()
    assert "4/4" in text.getvalue()
    assert "validation Dice 0.500" in text.getvalue()


def test_nobody_looks(capsys):
    show(None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_peak_memory_of_the_process_is_in_bytes():
    assert 2**27 < peak_memory(CPU) < 2**40
