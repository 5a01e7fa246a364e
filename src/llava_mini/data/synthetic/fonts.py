"""The fonts that signs and charts are written with: files of this package and of Pillow, never of the machine."""

from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

FONTS: dict[str, str | None] = {
    "sans": None,
    "bold": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif.ttf",
    "mono": "DejaVuSansMono-Bold.ttf",
}
"""Names of the fonts and their files in ``assets/fonts``; None is the font that comes with Pillow.

The files hold capital letters and digits only.
"""

CAPITAL_HEIGHT = 0.72
"""Height of a capital letter or a digit, as a share of the size of the font."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@lru_cache(maxsize=256)
def font_of(name: str, size: float) -> Font:
    """Return a font at a size in pixels.

    Raises:
        ValueError: If there is no font of this name; the message lists the known ones.
    """
    if name not in FONTS:
        raise ValueError(f"Unknown font {name!r}. The fonts are {', '.join(FONTS)}.")
    file = FONTS[name]
    if file is None:
        return ImageFont.load_default(size=size)
    path = Path(__file__).parents[2] / "assets" / "fonts" / file
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=65536)
def text_width(text: str, name: str, size: float) -> float:
    """Return how wide a line of text is, in pixels."""
    return font_of(name, size).getlength(text)
