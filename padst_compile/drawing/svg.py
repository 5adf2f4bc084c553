"""A picture as SVG, written by hand: two columns of boxes, before and after, on a card of its own colour."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from padst_compile.drawing.layout import Layout, lay_out

if TYPE_CHECKING:
    from padst_compile.drawing.block_graph import Box, Edge
    from padst_compile.drawing.picture import Picture

_WIDTH, _HEIGHT = 216, 38  # of a box
_CHARACTER = 7.5  # width
_ACROSS, _DOWN = 240, 60  # from one box to the next
_LANE, _MARGIN, _TOP, _LEGEND = 16, 28, 60, 44
_RADIUS = 7
_FONT = "ui-sans-serif, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"

_INK, _SOFT, _LINE, _CARD = "#1f2328", "#59636e", "#8c959f", "#ffffff"
_ORANGE, _GREEN = "#bc4c00", "#1a7f37"
_FILLS = {
    "outside": ("none", "none"),
    "operation": ("#f6f8fa", "#d1d9e0"),
    "dense": ("#eaeef2", "#8c959f"),
    "sparse": ("#ddf4ff", "#0969da"),
    "permutation": ("#fff1e5", _ORANGE),
}


@dataclasses.dataclass(frozen=True)
class _Panel:
    """One of the two columns."""

    picture: Picture
    layout: Layout
    left: float
    after: bool

    @property
    def width(self) -> float:
        return self.layout.breadth * _ACROSS + self.layout.lane_count * _LANE

    @property
    def middle(self) -> float:
        return self.left + self.layout.breadth * _ACROSS / 2

    def centre(self, box: int) -> tuple[float, float]:
        x = self.middle + self.layout.columns[box] * _ACROSS
        return x, _TOP + _HEIGHT / 2 + self.layout.rows[box] * _DOWN


def to_svg(picture: Picture) -> str:
    """The block as captured, and beside it after the passes."""
    layout = lay_out(picture.block)
    before = _Panel(picture, layout, _MARGIN, after=False)
    after = _Panel(picture, layout, 2 * _MARGIN + before.width, after=True)
    width = after.left + after.width + _MARGIN
    height = _TOP + layout.height * _DOWN + _LEGEND
    body = [*_card(width, height), *_panel(before), *_panel(after), *_legend(height)]
    title = escape(f"{picture.block.name or 'the model'}: permutations before and after the passes")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'font-family="{_FONT}" font-size="13" role="img">\n<title>{title}</title>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _card(width: float, height: float) -> Iterator[str]:
    """A background of its own, so that dark pages do not swallow the text, and the arrow heads."""
    yield f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="10" fill="{_CARD}" stroke="#d1d9e0"/>'
    for name, colour in (("plain", _LINE), ("green", _GREEN)):
        yield (
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0.5 L8 4 L0 7.5 z" fill="{colour}"/></marker>'
        )


def _panel(panel: _Panel) -> Iterator[str]:
    name = panel.picture.block.name or "the model"
    heading = f"{name}, after the passes" if panel.after else f"{name}, as captured"
    yield _text(panel.middle, 34, heading, size=15, bold=True)
    for number, edge in enumerate(panel.picture.block.edges):
        yield _edge(panel, edge, number)
    for number, box in enumerate(panel.picture.block.boxes):
        yield from _box(panel, box, number)


def _edge(panel: _Panel, edge: Edge, number: int) -> str:
    (x1, y1), (x2, y2) = panel.centre(edge.source), panel.centre(edge.target)
    y1, y2 = y1 + _HEIGHT / 2, y2 - _HEIGHT / 2 - 1
    colour, head = (_GREEN, "green") if panel.after and number in panel.picture.reordered else (_LINE, "plain")
    lane = panel.layout.lanes[number]
    if lane is None:
        bend = (y1 + y2) / 2
        path = (
            f"M{x1:g} {y1:g} L{x2:g} {y2:g}" if x1 == x2 else f"M{x1:g} {y1:g} C{x1:g} {bend:g} {x2:g} {bend:g} {x2:g} {y2:g}"
        )
    else:
        side = panel.middle + panel.layout.breadth * _ACROSS / 2 - (_ACROSS - _WIDTH) / 2 + (lane + 1) * _LANE
        top, bottom, r = y1 - _HEIGHT / 2, y2 + _HEIGHT / 2 + 1, _RADIUS
        source = panel.picture.block.boxes[edge.source]
        start = x1 + (_CHARACTER * (2 + len(source.title)) / 2 if source.kind == "outside" else _WIDTH / 2)
        path = (
            f"M{start:g} {top:g} H{side - r:g} Q{side:g} {top:g} {side:g} {top + r:g} "
            f"V{bottom - r:g} Q{side:g} {bottom:g} {side - r:g} {bottom:g} H{x2 + _WIDTH / 2 + 1:g}"
        )
    weight = 2.4 if colour == _GREEN else 1.4
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{weight}" marker-end="url(#{head})"/>'


def _box(panel: _Panel, box: Box, number: int) -> Iterator[str]:
    x, y = panel.centre(number)
    fill, stroke = _FILLS[box.kind]
    fate = panel.picture.fates.get(number, "") if panel.after else ""
    detail, colour = (fate, _fate_colour(fate)) if fate else (box.detail, _SOFT)
    gone = panel.after and number in panel.picture.gone
    if gone:
        fill, stroke = _CARD, colour
    elif fate and box.kind != "permutation":
        stroke = colour
    dashes = ' stroke-dasharray="4 3"' if gone else ""
    radius = _HEIGHT / 2 if box.kind == "permutation" else _RADIUS
    yield (
        f'<rect x="{x - _WIDTH / 2:g}" y="{y - _HEIGHT / 2:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="{radius:g}" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="{1.8 if fate else 1.2}"{dashes}/>'
    )
    if gone:
        yield _text(x, y + 4.5, detail, colour=colour)
    elif detail:
        yield _text(x, y - 3, box.title, bold=box.kind != "permutation", colour=_ORANGE if box.kind == "permutation" else _INK)
        yield _text(x, y + 12, detail, size=11, colour=colour)
    else:
        yield _text(x, y + 4.5, box.title, colour=_SOFT if box.kind == "outside" else _INK)


def _fate_colour(fate: str) -> str:
    return _GREEN if fate.startswith(("folded", "parameters")) else _ORANGE


def _legend(height: float) -> Iterator[str]:
    y = height - _LEGEND
    entries = (
        (_ORANGE, "a permutation that costs something at every call"),
        (_GREEN, "parameters stored, and tensors kept, in another channel order: free"),
    )
    for colour, words in entries:
        yield f'<line x1="{_MARGIN}" y1="{y}" x2="{_MARGIN + 22}" y2="{y}" stroke="{colour}" stroke-width="2.4"/>'
        yield _text(_MARGIN + 30, y + 4, words, size=12, colour=_SOFT, anchor="start")
        y += 20


def _text(
    x: float, y: float, words: str, *, size: int = 13, bold: bool = False, colour: str = _INK, anchor: str = "middle"
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
