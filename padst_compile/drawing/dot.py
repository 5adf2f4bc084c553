"""A picture in Graphviz's language."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from padst_compile.drawing.picture import Picture


def to_dot(picture: Picture) -> str:
    """The block after the passes; permutations that are gone are dashed."""
    lines = ["digraph block {", "  node [shape=box, style=rounded];"]
    for number, box in enumerate(picture.block.boxes):
        words = [word for word in (box.title, box.detail, picture.fates.get(number)) if word]
        style = ', style="rounded,dashed"' if number in picture.gone else ""
        lines.append(f"  b{number} [label={json.dumps(chr(10).join(words), ensure_ascii=False)}{style}];")
    for number, edge in enumerate(picture.block.edges):
        style = ' [style=bold, label="other channel order"]' if number in picture.reordered else ""
        lines.append(f"  b{edge.source} -> b{edge.target}{style};")
    return "\n".join([*lines, "}", ""])
