"""Contact sheets: every picture in its place, with its words."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from simpletuner.data.sheet import GAP_PX, LABEL_WIDTH_PX, MAX_LINES, _wrapped, contact_sheet


def plain(color: str, size: tuple[int, int] = (400, 200)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_pictures_stand_in_rows_and_columns_beside_their_labels() -> None:
    cells = [[plain("red"), plain("blue")], [plain("lime"), None]]
    sheet = contact_sheet(cells, ["a prompt", "another"], ["base", "step 50"], cell_px=200)
    left = GAP_PX + LABEL_WIDTH_PX + GAP_PX
    assert sheet.width == left + 2 * (200 + GAP_PX)
    found = np.asarray(sheet)
    center_of_first = found[:, left + 100]
    ys = {name: np.flatnonzero((center_of_first == color).all(1)) for name, color in COLORS.items()}
    assert len(ys["red"]) == len(ys["lime"]) == 100
    assert ys["red"].max() < ys["lime"].min()
    assert (found[ys["red"].min() + 50, left + 200 + GAP_PX + 100] == COLORS["blue"]).all()
    assert (found[: ys["red"].min(), left:] < 128).any(), "the heads are written"
    assert (found[:, :LABEL_WIDTH_PX] < 128).any(), "the labels are written"


COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


def test_pictures_are_never_enlarged_and_empty_labels_take_no_room() -> None:
    sheet = contact_sheet([[plain("red", (30, 20))]], [""], [""])
    assert sheet.width == GAP_PX + LABEL_WIDTH_PX + GAP_PX
    assert (np.asarray(sheet) == COLORS["red"]).all(2).sum() == 600


def test_captions_stand_below_and_rows_may_be_shorter() -> None:
    cells = [[plain("red"), plain("red")], [plain("red")]]
    without = contact_sheet(cells, ["", ""], ["", ""])
    with_captions = contact_sheet(cells, ["", ""], ["", ""], captions=[["a " * 100, ""], ["short"]])
    assert with_captions.height > without.height


@pytest.mark.parametrize("text", ["one two three " * 40, "a" * 200, "Ω" * 100, "", "two\nlines", "  \n "])
def test_text_fits_its_width(text: str) -> None:
    font = ImageFont.load_default(15)
    lines = _wrapped(text, 120, font)
    assert len(lines) <= MAX_LINES
    assert all(font.getlength(line.removesuffix(" …")) <= 120 for line in lines)
    shown = "".join(lines).removesuffix(" …").replace(" ", "")
    assert "".join(text.split()).startswith(shown)
