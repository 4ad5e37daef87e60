"""Contact sheets: pictures in rows and columns with labels, for looking at many at once."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
MARGIN = 6
INK, PAPER = (40, 40, 40), (255, 255, 255)


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    column_labels: Sequence[str],
    cell: int,
    first_column: Sequence[Image.Image] = (),
    first_label: str = "face",
) -> Image.Image:
    """Arrange pictures with a label over each column, scaled to `cell` pixels square.

    `first_column` (one per row) is set apart at the left: the faces that the rows show.
    """
    font = ImageFont.load_default(size=max(11, cell // 13))
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = [first_label, *column_labels] if first_column else list(column_labels)
    wrapped = [_wrap(probe, text, font, cell) for text in labels]
    header = max(int(probe.multiline_textbbox((0, 0), text, font=font)[3]) for text in wrapped)
    header += 2 * MARGIN
    step = cell + MARGIN
    gap = MARGIN * 2 if first_column else 0
    sheet = Image.new("RGB", (MARGIN + step * len(labels) + gap, header + step * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)

    def left(column: int) -> int:
        return MARGIN + step * column + (gap if column > 0 else 0)

    for column, text in enumerate(wrapped):
        draw.multiline_text((left(column), MARGIN), text, fill=INK, font=font)
    for index, row in enumerate(rows):
        pictures = [first_column[index], *row] if first_column else row
        for column, picture in enumerate(pictures):
            # Small pictures are enlarged without smoothing twice: bicubic keeps them honest.
            scaled = picture.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(scaled, (left(column), header + step * index))
    return sheet
