"""The report's sheet: one row of pictures a model, one column a prompt, for eyes to compare."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from koala.utils.contact_sheet import INK, PAPER, wrap

CELL = 128  # pixels of a picture's side on the sheet; small pictures are enlarged to it
MARGIN, GAP = 24, 8
LABEL = 170  # pixels for the models' names on the left
FONT_SIZE, LINE = 15, 18


def picture_grid(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """A white RGB sheet: names of `rows` on the left, `captions` above, pictures in the cells.

    Each row has one picture for each caption. Pictures are fitted into square cells.
    """
    assert rows
    assert captions
    assert all(len(row) == len(captions) for row in rows.values())
    font = ImageFont.load_default(FONT_SIZE)
    headings = [wrap(caption, font, CELL) for caption in captions]
    top = MARGIN + LINE * max(len(lines) for lines in headings) + GAP
    left = MARGIN + LABEL
    step = CELL + GAP
    width = left + step * len(captions) - GAP + MARGIN
    sheet = Image.new("RGB", (width, top + step * len(rows) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(headings):
        start = top - GAP - LINE * len(lines)  # captions stand on their pictures
        for i, line in enumerate(lines):
            draw.text((left + step * column, start + LINE * i), line, fill=INK, font=font)
    for r, (name, pictures) in enumerate(rows.items()):
        lines = wrap(name, font, LABEL - 2 * GAP)
        start = top + step * r + (CELL - LINE * len(lines)) // 2
        for i, line in enumerate(lines):
            draw.text((MARGIN, start + LINE * i), line, fill=INK, font=font)
        for column, picture in enumerate(pictures):
            cell = _fitted(picture)
            x = left + step * column + (CELL - cell.width) // 2
            sheet.paste(cell, (x, top + step * r + (CELL - cell.height) // 2))
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    factor = CELL / max(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
