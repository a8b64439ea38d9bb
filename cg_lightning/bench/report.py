"""Puts the figures of an earlier run into documents.

``python -m cg_lightning.bench.report RECORDS.jsonl --image IMAGE --all ALL --pages PAGE.md``
draws two charts, each as SVG and PNG, and fills the tables of the pages.
``python -m cg_lightning.bench.report ZOO.jsonl OTHER.jsonl --zoo PAGE.md`` writes the page of the
zoo, from the records of one run or more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cg_lightning.bench.charts import draw_all, draw_before_after
from cg_lightning.bench.records import describe_environment, read_environment, read_lines
from cg_lightning.bench.tables import fill_page
from cg_lightning.bench.zoo import read_results, zoo_table


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the charts and fill the tables of pages, from the records of an earlier run."""
    parser = argparse.ArgumentParser(prog="python -m cg_lightning.bench.report")
    parser.add_argument(
        "records", type=Path, nargs="+", help="lines of JSON that task=bench or task=zoo wrote"
    )
    parser.add_argument("--zoo", type=Path, help="page of the zoo, from all files of records")
    parser.add_argument("--image", type=Path, help="chart of the README, without .svg and .png")
    parser.add_argument("--stage", default="validate", help="its stage: validate, predict or train")
    parser.add_argument("--all", type=Path, help="chart of all contestants, without .svg and .png")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=[], help="pages with <!-- bench: NAME --> blocks"
    )
    given = parser.parse_args(arguments)
    if given.zoo:
        given.zoo.write_text(zoo_page(given.records))
        print(given.zoo)
        return
    if len(given.records) > 1:
        parser.error("only --zoo joins several files of records")
    (records,) = given.records
    files = list(given.pages)
    filled = [fill_page(page.read_text(), records) for page in given.pages]
    for page, text in zip(given.pages, filled, strict=True):
        page.write_text(text)
    if given.image:
        files += draw_before_after(
            read_lines(records),
            given.image,
            stage=given.stage,
            where=describe_environment(read_environment(records)),
        )
    if given.all:
        files += draw_all(read_lines(records), given.all)
    print(*files, sep="\n")


def zoo_page(files: Sequence[Path]) -> str:
    """Return the page of the zoo.

    Args:
        files: Files of records; of a model that is in several, the last one counts.
    """
    machines = dict.fromkeys(describe_environment(read_environment(file)) for file in files)
    return (
        "# Models of other libraries\n\n"
        "`cg-lightning task=zoo` has made this page's records ([method](benchmark.md)): random "
        "weights, all\noutputs compared with eager's bit for bit, times in microseconds a batch.\n"
        f"Hardware and versions: {'; '.join(machines)}.\n\n{zoo_table(read_results(files))}\n"
    )


if __name__ == "__main__":
    main()
