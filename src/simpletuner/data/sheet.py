"""Contact sheets: thumbnails with captions, such as a dataset's crops or a run's validation images by step."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from PIL import Image, ImageDraw, ImageFont

GAP_PX = 12
LABEL_WIDTH_PX = 200
TEXT_PX = 15
LINE_PX = 20
MAX_LINES = 6
"""Longer text is cut and ends in an ellipsis."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER, INK, EMPTY_FRAME_COLOR = "white", "#222222", "#eeeeee"


def contact_sheet(
    cells: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    cell_px: int = 320,
) -> Image.Image:
    """A table of images in RGB. Images are shrunk to a longer side of at most `cell_px`, never enlarged.

    Args:
        cells: rows of images, at most one per column; None draws an empty frame.
        row_labels: texts to the left of each row; if all are "", there is no such column.
        column_labels: texts above each column; if all are "", there is no such line.
        captions: a text below each image, in the shape of `cells`.
    """
    font = ImageFont.load_default(TEXT_PX)
    thumbs = [[None if image is None else _shrunk(image, cell_px) for image in row] for row in cells]
    widest = max((thumb.width for row in thumbs for thumb in row if thumb), default=0)
    cell_px = min(cell_px, max(widest, LABEL_WIDTH_PX))
    texts = [
        [_wrapped(text, cell_px, font) for text in (captions[row] if captions else [""] * len(cells[row]))]
        for row in range(len(cells))
    ]
    heads = [_wrapped(label, cell_px, font) for label in column_labels]
    sides = [_wrapped(label, LABEL_WIDTH_PX, font) for label in row_labels]
    left = GAP_PX + (LABEL_WIDTH_PX + GAP_PX if any(row_labels) else 0)
    top = GAP_PX + (max(map(_height, heads)) + GAP_PX if any(column_labels) else 0)
    image_heights = [max((thumb.height for thumb in row if thumb), default=LINE_PX * MAX_LINES) for row in thumbs]
    heights = [
        max(height + max(map(_height, row), default=0), _height(side)) + 2 * GAP_PX
        for height, row, side in zip(image_heights, texts, sides, strict=True)
    ]
    tops = list(accumulate(heights, initial=top))
    step = cell_px + GAP_PX
    sheet = Image.new("RGB", (left + step * len(column_labels), tops[-1]), PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, lines: Sequence[str]) -> None:
        draw.multiline_text((x, y), "\n".join(lines), fill=INK, font=font, spacing=LINE_PX - TEXT_PX)

    for column, lines in enumerate(heads):
        write(left + step * column, GAP_PX, lines)
    for row, y in enumerate(tops[:-1]):
        write(GAP_PX, y, sides[row])
        for column, thumb in enumerate(thumbs[row]):
            x = left + step * column
            if thumb is not None:
                sheet.paste(thumb, (x, y))
                write(x, y + image_heights[row] + GAP_PX // 3, texts[row][column])
            else:
                draw.rectangle((x, y, x + cell_px - 1, y + image_heights[row] - 1), fill=EMPTY_FRAME_COLOR)
    return sheet


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Join images into one, from left to right, all resized to the smallest height."""
    height = min(image.height for image in images)
    thumbs = [image.resize((max(1, image.width * height // image.height), height)) for image in images]
    *lefts, width = accumulate((thumb.width for thumb in thumbs), initial=0)
    joined = Image.new("RGB", (width, height))
    for left, thumb in zip(lefts, thumbs, strict=True):
        joined.paste(thumb, (left, 0))
    return joined


def _shrunk(image: Image.Image, side_px: int) -> Image.Image:
    thumb = image.convert("RGB")
    thumb.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return thumb


def _height(lines: Sequence[str]) -> int:
    return LINE_PX * len(lines)


def _wrapped(text: str, width_px: int, font: Font) -> list[str]:
    """Break `text` into lines of at most `width_px`, at spaces where possible."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for piece in _pieces(paragraph, width_px, font):
            longer = f"{line} {piece}" if line else piece
            if line and font.getlength(longer) > width_px:
                lines.append(line)
                line = piece
            else:
                line = longer
        if line:
            lines.append(line)
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1] + " …"]


def _pieces(paragraph: str, width_px: int, font: Font) -> Iterator[str]:
    """The words of a paragraph; a word that is wider than a line is split into pieces."""
    for word in paragraph.split():
        remaining = word
        while len(remaining) > 1 and font.getlength(remaining) > width_px:
            # Count upward: measuring a text takes time in proportion to its length.
            fits = next(n for n in range(1, len(remaining)) if font.getlength(remaining[: n + 1]) > width_px)
            yield remaining[:fits]
            remaining = remaining[fits:]
        yield remaining
