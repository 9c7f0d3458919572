"""A contact sheet shows every image, unsmoothed, in its row and column, with its labels."""

import pytest
from PIL import Image, ImageChops

from difflex.errors import BadInput
from difflex.images import contact_sheet

COLOURS = [["red", "lime", "blue"], ["cyan", "magenta", "yellow"]]


def plain(colour: str, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


def sheet(side: int = 16, rows: tuple[str, ...] = ("one", "two"), columns: tuple[str, ...] = ("a", "b", "c")) -> Image.Image:
    images = [[plain(colour) for colour in row] for row in COLOURS]
    return contact_sheet(images, row_labels=rows, column_labels=columns, side=side)


def box(image: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Return the box of the pixels of `colour`: left, top, right, bottom."""
    same = ImageChops.difference(image, plain(colour, image.size)).convert("L").point(lambda v: 255 * (v == 0))
    box = same.getbbox()
    assert box, f"no pixel is {colour}"
    return box


def test_every_image_is_in_its_row_and_column():
    places = [[box(sheet(), colour)[:2] for colour in row] for row in COLOURS]
    assert [[y for _, y in row] for row in places] == [[places[0][0][1]] * 3, [places[1][0][1]] * 3]
    assert places[0][0][0] < places[0][1][0] < places[0][2][0]
    assert [x for x, _ in places[0]] == [x for x, _ in places[1]]
    assert places[0][0][1] < places[1][0][1]


@pytest.mark.parametrize(("side", "expected"), [(8, 8), (16, 16), (20, 24), (1, 8)])
def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_left(side: int, expected: int):
    left, top, right, bottom = box(sheet(side), "magenta")
    assert (right - left, bottom - top) == (expected, expected)


def test_enlarging_makes_no_new_colours():
    checkers = Image.new("RGB", (2, 2), "red")
    checkers.putpixel((0, 0), (0, 0, 255))
    shown = contact_sheet([[checkers]], row_labels=[""], column_labels=[""], side=64)
    colours = {colour for _, colour in shown.getcolors() or []}
    assert colours == {(255, 0, 0), (0, 0, 255), (255, 255, 255)}


def test_labels_are_drawn_outside_the_images():
    blank, labelled = sheet(rows=("", "")), sheet(rows=("", "a row"))
    grid = box(labelled, "cyan")
    assert labelled.width > blank.width
    margin = labelled.crop((0, grid[1], grid[0], grid[3])).convert("L")
    assert min(margin.tobytes()) < 100


def test_a_long_label_is_cut_and_stays_within_the_margin():
    images = [[plain("red", (60, 60))]]
    long = contact_sheet(images, row_labels=["a very long prompt " * 50], column_labels=["word" * 100], side=60)
    short = contact_sheet(images, row_labels=["a"], column_labels=["b"], side=60)
    assert long.height == short.height
    assert long.width < 60 + 250


def test_images_of_several_sizes_and_modes_share_a_grid():
    images = [[plain("red", (8, 4)), Image.new("L", (4, 8), 0)]]
    shown = contact_sheet(images, row_labels=["x"], column_labels=["a", "b"], side=8)
    left, top, right, bottom = box(shown, "red")
    assert (right - left, bottom - top) == (8, 4)


@pytest.mark.parametrize(
    ("rows", "columns"), [(("one",), ("a", "b", "c")), (("one", "two"), ("a", "b")), (("one", "two", "three"), ("a", "b", "c"))]
)
def test_labels_that_do_not_match_the_images_are_refused(rows: tuple[str, ...], columns: tuple[str, ...]):
    with pytest.raises(BadInput, match=r"rows of \[3, 3\] images"):
        sheet(rows=rows, columns=columns)


def test_a_sheet_without_images_is_refused():
    with pytest.raises(BadInput, match="no images"):
        contact_sheet([], row_labels=[], column_labels=["a"])
