"""
Put measured labs into the explanation pages: ``python scripts/lab_pages.py FOLDER``, where ``groundup lab`` wrote to FOLDER.

What is between ``<!-- lab: NAME -->`` and ``<!-- end -->`` is written from the numbers, here and nowhere else; the numbers
and the picture go to docs/images/lab/.
"""

import re
import shutil
import sys
from pathlib import Path

from groundup.lab.carry_out import described, paragraph, read_runs, results_of
from groundup.lab.registry import experiment_named

DOCS = Path(__file__).parents[1] / "docs"
KEPT = DOCS / "images" / "lab"
BLOCK = re.compile(r"(<!-- lab: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def block(name: str) -> str:
    """What the kept numbers of a lab say, as Markdown, between its two comments."""
    experiment, runs = experiment_named(name), read_runs(KEPT / f"{name}.json", name)
    results = results_of(experiment, runs, seeds=1 + max(run.seed for run in runs))
    return described(experiment, paragraph(experiment, results)[0], f"../images/lab/{name}.png")


def filled(page: str) -> str:
    """A page with all its blocks as the numbers have them."""
    return BLOCK.sub(lambda found: found[1] + block(found[2]) + found[4], page)


def main() -> None:
    """Copy what was measured, and fill every page."""
    KEPT.mkdir(exist_ok=True)
    for path in [*Path(sys.argv[1]).glob("*.json"), *Path(sys.argv[1]).glob("*.png")]:
        shutil.copy(path, KEPT / path.name)
    for path in sorted((DOCS / "explanation").glob("*.md")):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
