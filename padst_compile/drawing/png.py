"""A picture as PNG, from the SVG. The fonts come with matplotlib, so that it looks the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from padst_compile.drawing.svg import to_svg
from padst_compile.errors import MissingPackageError

if TYPE_CHECKING:
    from padst_compile.drawing.picture import Picture

_ZOOM = 2  # pixels to a unit of the SVG
_FONT = "DejaVu Sans"


def to_png(picture: Picture) -> bytes:
    """The block as captured, and beside it after the passes.

    Raises:
        MissingPackageError: resvg_py or matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        import resvg_py
    except ImportError as error:
        raise MissingPackageError(
            "a PNG needs resvg_py and matplotlib: pip install 'padst_compile[draw]', or write a file .svg"
        ) from error
    fonts = str(Path(mpl.get_data_path()) / "fonts" / "ttf")
    drawn = resvg_py.svg_to_bytes(
        svg_string=to_svg(picture),
        zoom=_ZOOM,
        skip_system_fonts=True,
        font_dirs=[fonts],
        sans_serif_family=_FONT,
        font_family=_FONT,
    )
    return bytes(drawn)
