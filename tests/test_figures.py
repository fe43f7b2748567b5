import csv

import matplotlib.image
import numpy as np
import pytest

from effseg import figures
from effseg.errors import InputError
from effseg.figures import overlay
from effseg.figures.canvas import organ_colours

NAMES = ("background", "liver", "spleen")
LOGGED = ("step", "epoch", "seconds", "learning_rate", "loss")


def write_log(path, steps=40, validate_every=10):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*LOGGED, "dice_mean", "dice_liver", "dice_spleen"])
        for step in range(1, steps + 1):
            dice = [0.5, 0.6, ""] if step % validate_every == 0 else ["", "", ""]
            writer.writerow([step, step // 8, 0.5 * step, 1e-3, 2.0 / step, *dice])


@pytest.fixture
def volume():
    """A dark box of (20, 16, 12) voxels: the liver right in front, the spleen left behind."""
    image = np.full((20, 16, 12), -1000, np.int16)
    labels = np.zeros(image.shape, np.uint8)
    labels[14:18, 10:14, 4:8] = 1
    labels[2:6, 2:6, 4:8] = 2
    image[labels > 0] = 60
    return image, labels


def test_curves(tmp_path):
    write_log(tmp_path / "progress.csv")
    figures.draw_curves(tmp_path / "progress.csv", tmp_path / "curves.png")
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert picture.shape[0] > 500
    assert picture[..., :3].std() > 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "progress.csv"]


@pytest.mark.parametrize(("steps", "validate_every"), [(1, 10), (3, 1)])
def test_curves_of_a_run_that_has_just_begun(tmp_path, steps, validate_every):
    write_log(tmp_path / "progress.csv", steps, validate_every)
    figures.draw_curves(tmp_path / "progress.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_curves_without_validation_columns(tmp_path):
    (tmp_path / "p.csv").write_text(",".join(LOGGED) + "\n1,0,0.5,0.001,2.5\n2,0,1.0,0.001,2.0\n3,0,1.")
    figures.draw_curves(tmp_path / "p.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no file"),
        ("", "the column step"),
        ("step,loss\n1,2\n", "the column seconds"),
        (",".join(LOGGED) + "\n", "at least one row"),
        (",".join(LOGGED) + "\n1,0\n", "at least one row"),
        (",".join(LOGGED) + "\n1,0,x,0.1,2\n", "numbers"),
    ],
)
def test_curves_of_a_bad_log(tmp_path, content, message):
    path = tmp_path / "progress.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        figures.draw_curves(path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_overlay(tmp_path, volume):
    image, labels = volume
    figures.draw_overlay(image, labels, NAMES, tmp_path / "one.png")
    figures.draw_overlay(image[None], labels, NAMES, tmp_path / "two.png", reference=np.roll(labels, 1, 0))
    one, two = (matplotlib.image.imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.shape[0] > 1.5 * one.shape[0]  # the reference lies below the prediction
    for picture in (one, two):
        for colour in organ_colours(2):
            assert (np.abs(picture[..., :3] - colour).max(-1) < 0.02).any()


def test_overlay_in_millimetres(tmp_path, volume):
    """Thick slices stretch the coronal and the sagittal picture, not the axial one."""
    image, labels = volume
    for name, spacing in (("cubes.png", (2.0, 2.0, 2.0)), ("slabs.png", (2.0, 2.0, 6.0))):
        figures.draw_overlay(image, labels, NAMES, tmp_path / name, spacing=spacing)
    cubes, slabs = (matplotlib.image.imread(tmp_path / name) for name in ("cubes.png", "slabs.png"))
    assert slabs.shape[0] > 1.8 * cubes.shape[0]


def test_overlay_without_organs(tmp_path, volume):
    image, labels = volume
    empty = np.zeros_like(labels)
    figures.draw_overlay(image, empty, NAMES, tmp_path / "none.png", reference=empty)
    assert (tmp_path / "none.png").is_file()


def test_overlay_refuses_another_shape(tmp_path, volume):
    image, labels = volume
    with pytest.raises(ValueError, match=r"reference: expected the image's shape \(20, 16, 12\)"):
        figures.draw_overlay(image, labels, NAMES, tmp_path / "o.png", reference=labels[1:])
    assert not list(tmp_path.iterdir())


def test_views_are_as_radiologists_look(volume):
    """Rows run from bottom to top, columns from the viewer's left to right."""
    _, labels = volume
    places = zip(overlay._VIEWS, (5, 12, 16), strict=True)
    axial, coronal, sagittal = (overlay._plane(labels, view, place) for view, place in places)
    assert axial.shape == (16, 20)
    assert axial[12, 4] == 1  # in front and patient's right: up and left
    assert axial[3, 15] == 2
    assert coronal.shape == (12, 20)
    assert coronal[5, 4] == 1
    assert sagittal.shape == (12, 16)
    assert sagittal[5, 3] == 1  # anterior to the left
    labels[:, :, 11] = 2
    assert overlay._plane(labels, overlay._VIEWS[1], 12)[11].all()  # superior up


def test_slices_cross_most_organs(volume):
    _, labels = volume
    axial, coronal, sagittal = overlay._slices(labels, len(NAMES))
    assert axial in (5, 6)  # the middle of the planes which both organs share
    assert labels[:, coronal].any()
    assert labels[sagittal].any()
    assert overlay._slices(np.zeros_like(labels), len(NAMES)) == [5, 7, 9]


def test_tint_has_an_opaque_rim():
    plane = np.zeros((7, 7), np.uint8)
    plane[1:6, 1:6] = 1
    rgba = overlay._tint(plane, [(1.0, 0.0, 0.0)])
    assert rgba[0, 0, 3] == 0
    assert rgba[1, 3, 3] > rgba[3, 3, 3] > 0
    assert rgba[3, 3, 0] == 1


@pytest.mark.parametrize("count", [1, 10, 11, 117])
def test_colours_differ(count):
    colours = organ_colours(count)
    assert len(set(colours)) == count
