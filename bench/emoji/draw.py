"""Draw emoji.png, which train.py learns from: only needed again when names.txt changes.

    python bench/emoji/draw.py NotoColorEmoji.ttf

The font is Noto Color Emoji (SIL Open Font License 1.1), as Debian's fonts-noto-color-emoji has it:
`apt-get download fonts-noto-color-emoji`, then `dpkg -x`. The picture was drawn with 2.042. It is
in the repository so that training needs no font, and starts from the same pixels everywhere.
"""

from __future__ import annotations

import argparse
import unicodedata

from pictures import COLUMNS, NAMES, SHEET, SIZE
from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 109  # the only one in the font's bitmaps, which are 136 x 128


def draw(name: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The emoji of a Unicode name, RGBA of SIZE x SIZE pixels."""
    image = Image.new("RGBA", (136, 136))
    character = unicodedata.lookup(name.upper())
    ImageDraw.Draw(image).text((0, 4), character, font=font, embedded_color=True, anchor="lt")
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("font", help="NotoColorEmoji.ttf")
    font = ImageFont.truetype(parser.parse_args().font, FONT_SIZE)
    rows = -(-len(NAMES) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SIZE, rows * SIZE))
    for index, name in enumerate(NAMES):
        row, column = divmod(index, COLUMNS)
        sheet.paste(draw(name, font), (column * SIZE, row * SIZE))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
