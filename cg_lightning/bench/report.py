"""Puts the figures of an earlier run into documents.

``python -m cg_lightning.bench.report RECORDS.jsonl --image IMAGE --all ALL --pages PAGE.md``
draws two charts, each as SVG and PNG, and fills the tables of the pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cg_lightning.bench.charts import draw_all, draw_before_after
from cg_lightning.bench.records import describe_environment, read_environment, read_lines
from cg_lightning.bench.tables import fill_page


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the charts and fill the tables of pages, from the records of an earlier run."""
    parser = argparse.ArgumentParser(prog="python -m cg_lightning.bench.report")
    parser.add_argument("records", type=Path, help="lines of JSON that task=bench wrote")
    parser.add_argument("--image", type=Path, help="chart of the README, without .svg and .png")
    parser.add_argument("--stage", default="validate", help="its stage: validate, predict or train")
    parser.add_argument("--all", type=Path, help="chart of all contestants, without .svg and .png")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=[], help="pages with <!-- bench: NAME --> blocks"
    )
    given = parser.parse_args(arguments)
    files = list(given.pages)
    filled = [fill_page(page.read_text(), given.records) for page in given.pages]
    for page, text in zip(given.pages, filled, strict=True):
        page.write_text(text)
    if given.image:
        files += draw_before_after(
            read_lines(given.records),
            given.image,
            stage=given.stage,
            where=describe_environment(read_environment(given.records)),
        )
    if given.all:
        files += draw_all(read_lines(given.records), given.all)
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
