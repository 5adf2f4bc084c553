"""One HTML page of everything that was recorded, with a picture per file: `make report`.

python benchmarks/evidence.py [--out FOLDER]     writes FOLDER/index.html and a PNG for each result
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from listings import listings
from ratios import RESULTS, Recorded, recorded, where
from rich.console import Console

from padst_compile.files import replace_file, replace_text

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "accuracy"))

from report import sections  # noqa: E402  # of the accuracy study, a folder of scripts of its own

STUDY = "accuracy-study.jsonl"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "report")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string((HERE / "evidence.html").read_text()).render(
        parts=[_part(file, arguments.out) for file in recorded(arguments.results) if file.cases],
        listings=list(listings(arguments.results)),
        where=where,
        study=markupsafe.Markup("\n".join(_study(arguments.results / STUDY))),
    )
    replace_text(arguments.out / "index.html", page)
    Console().print(f"written to {arguments.out / 'index.html'}", soft_wrap=True)


def _part(file: Recorded, out: Path) -> dict[str, Any]:
    columns = list(dict.fromkeys(candidate for case in file.cases for candidate in case.ratios))
    picture = out / f"{Path(file.file).stem}.png"
    _draw(file, columns, picture)
    return {
        "title": file.title,
        "file": file.file,
        "where": where(file.machine),
        "columns": columns,
        "cases": file.cases,
        "has_ideal": any(case.ideal is not None for case in file.cases),
        "picture": "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode(),
    }


def _draw(file: Recorded, columns: list[str], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    height = 0.8 / len(columns)
    figure, axis = plt.subplots(figsize=(11, 0.7 + 0.16 * len(file.cases) * (len(columns) + 1)))
    for number, column in enumerate(columns):
        places = [place + number * height for place, case in enumerate(file.cases) if column in case.ratios]
        axis.barh(places, [case.ratios[column] for case in file.cases if column in case.ratios], height, label=column)
    axis.set_yticks([place + 0.4 - height / 2 for place in range(len(file.cases))], [case.name for case in file.cases])
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("times as fast as the best dense")
    axis.legend(loc="lower right")
    replace_file(path, lambda draft: figure.savefig(draft, format="png", dpi=90, bbox_inches="tight"))
    plt.close(figure)


def _study(path: Path) -> list[str]:
    if not path.exists():
        return []
    head = f"<h1>Accuracy study</h1><p>from <code>{STUDY}</code></p>"
    return [head, *sections([json.loads(line) for line in path.read_text().splitlines()])]


if __name__ == "__main__":
    main()
