"""Contact sheets: many images with captions on one page.

The demo and training previews use `contact_sheet`; the evaluation's report uses `image_grid`,
with one row per model and one column per prompt.
"""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 24  # pixels around the sheet
GAP = 20  # between columns, and between rows
CAPTION_GAP = 8  # between an image and its caption
NARROWEST = 96  # pixels: minimum width of a cell, for its caption
CELL = 128  # pixels: side of a grid's cells; images are scaled to it
CELL_GAP = 8
CELL_FONT, CELL_LINE = 15, 18
LABEL = 170  # pixels: width of the row names in a grid
INK = (40, 40, 40)
PAPER = (255, 255, 255)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def contact_sheet(
    images: list[Image.Image],
    captions: list[str],
    columns: int,
    scale: int = 1,
    title: str | None = None,
) -> Image.Image:
    """A white RGB sheet of `images`, row by row in `columns`, a wrapped caption under each.

    scale: integer factor that enlarges every image (Lanczos). Transparent images are shown on
    white. Images of different sizes are centred in cells of the largest width.
    """
    assert images and len(images) == len(captions) and columns >= 1 and scale >= 1
    prepared = [_prepared(image, scale) for image in images]
    columns = min(columns, len(prepared))
    width = max(NARROWEST, *(image.width for image in prepared))
    font = ImageFont.load_default(_font_size(width))
    title_font = ImageFont.load_default(2 * _font_size(width))
    sheet_width = 2 * MARGIN + columns * width + (columns - 1) * GAP
    title_lines = wrap(title, title_font, sheet_width - 2 * MARGIN) if title else []
    texts = [wrap(caption, font, width) for caption in captions]
    starts = range(0, len(prepared), columns)
    heights = [
        max(image.height for image in prepared[start : start + columns])
        + CAPTION_GAP
        + max(len(lines) for lines in texts[start : start + columns]) * _line_height(font)
        for start in starts
    ]
    top = MARGIN + len(title_lines) * _line_height(title_font) + (GAP if title_lines else 0)
    sheet_height = top + sum(heights) + GAP * (len(heights) - 1) + MARGIN
    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, title_lines, title_font, MARGIN, MARGIN)
    for start, height in zip(starts, heights, strict=True):
        row = prepared[start : start + columns]
        text_top = top + max(image.height for image in row) + CAPTION_GAP
        for column, image in enumerate(row):
            left = MARGIN + column * (width + GAP)
            offset = text_top - CAPTION_GAP - image.height
            sheet.paste(image, (left + (width - image.width) // 2, offset))
            _write(draw, texts[start + column], font, left, text_top, centre_in=width)
        top += height + GAP
    return sheet


def image_grid(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """A white RGB sheet: names of `rows` on the left, `captions` above, images in the cells.

    Each row has one image per caption. Images are scaled to fit square cells.
    """
    assert rows
    assert captions
    assert all(len(row) == len(captions) for row in rows.values())
    font = ImageFont.load_default(CELL_FONT)
    headings = [wrap(caption, font, CELL) for caption in captions]
    top = MARGIN + CELL_LINE * max(len(lines) for lines in headings) + CELL_GAP
    left = MARGIN + LABEL
    step = CELL + CELL_GAP
    width = left + step * len(captions) - CELL_GAP + MARGIN
    sheet = Image.new("RGB", (width, top + step * len(rows) - CELL_GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(headings):
        start = top - CELL_GAP - CELL_LINE * len(lines)  # captions are aligned to the images below
        for i, line in enumerate(lines):
            draw.text((left + step * column, start + CELL_LINE * i), line, fill=INK, font=font)
    for r, (name, images) in enumerate(rows.items()):
        lines = wrap(name, font, LABEL - 2 * CELL_GAP)
        start = top + step * r + (CELL - CELL_LINE * len(lines)) // 2
        for i, line in enumerate(lines):
            draw.text((MARGIN, start + CELL_LINE * i), line, fill=INK, font=font)
        for column, image in enumerate(images):
            cell = _fitted(image)
            x = left + step * column + (CELL - cell.width) // 2
            sheet.paste(cell, (x, top + step * r + (CELL - cell.height) // 2))
    return sheet


def wrap(text: str, font: Font, width: int) -> list[str]:
    """`text` in lines at most `width` pixels wide; longer words are split."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            *pieces, line = _cut(word, font, width)
            lines.extend(pieces)
        if line:
            lines.append(line)
    return lines


def _cut(word: str, font: Font, width: int) -> list[str]:
    """`word` in non-empty pieces at most `width` pixels wide."""
    pieces = [word[0]]
    for letter in word[1:]:
        if font.getlength(pieces[-1] + letter) <= width:
            pieces[-1] += letter
        else:
            pieces.append(letter)
    return pieces


def _prepared(image: Image.Image, scale: int) -> Image.Image:
    """The image on white, enlarged."""
    rgba = image.convert("RGBA")
    flat = Image.new("RGBA", rgba.size, (*PAPER, 255))
    flat.alpha_composite(rgba)
    opaque = flat.convert("RGB")
    if scale == 1:
        return opaque
    size = (opaque.width * scale, opaque.height * scale)
    return opaque.resize(size, Image.Resampling.LANCZOS)


def _font_size(width: int) -> int:
    """Font size for images of that width: 16 px for 192 px."""
    return max(11, min(24, width // 12))


def _line_height(font: Font) -> int:
    top, bottom = font.getbbox("Ág")[1], font.getbbox("Ág")[3]
    return round(1.25 * (bottom - top))


def _write(
    draw: ImageDraw.ImageDraw,
    lines: list[str],
    font: Font,
    left: int,
    top: int,
    centre_in: int | None = None,
) -> None:
    for i, line in enumerate(lines):
        slack = 0 if centre_in is None else (centre_in - font.getlength(line)) / 2
        draw.text((left + slack, top + i * _line_height(font)), line, fill=INK, font=font)


def _fitted(image: Image.Image) -> Image.Image:
    factor = CELL / max(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
