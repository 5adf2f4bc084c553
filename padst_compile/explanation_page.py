"""An explanation as one HTML page: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jinja2
import markupsafe

from padst_compile.explain import Explanation
from padst_compile.files import replace_text

_TEMPLATE = Path(__file__).with_suffix(".html")
_SPARSE = ("native", "triton", "registered", "aten", "cusparselt")


def explanation_page(explanation: Explanation, title: str, facts: Mapping[str, str], picture: str = "") -> str:
    """The page.

    Args:
        explanation: from `padst.explain`.
        title: what was explained, as in "timm:vit_tiny_patch16_224".
        facts: what a reader must know to repeat it, such as the specification and the machine.
        picture: SVG of a block, from `padst_compile.drawing`; none if empty. Not escaped.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["milliseconds"] = _milliseconds
    return environment.from_string(_TEMPLATE.read_text()).render(
        explanation=explanation,
        title=title,
        facts=facts,
        picture=markupsafe.Markup(picture),
        sparse_kernels=sum(layer.kernel in _SPARSE for layer in explanation.layers),
    )


def write_page(path: Path, explanation: Explanation, title: str, facts: Mapping[str, str], picture: str = "") -> None:
    """Write `explanation_page` to a file, which is replaced atomically; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, explanation_page(explanation, title, facts, picture))


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3f}"
