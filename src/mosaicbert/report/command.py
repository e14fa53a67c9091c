"""`mosaicbert report RUN_DIR ...`, and the report that each run leaves behind."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from mosaicbert.errors import ConfigError, DataError
from mosaicbert.report.charts import charts_of
from mosaicbert.report.page import build_page
from mosaicbert.report.runs import read_run
from mosaicbert.train.loggers import write_whole

log = logging.getLogger(__name__)

NAME = "report.html"
PNG_AFTER_SECONDS = 60.0
"""Runs from this length on also leave PNGs: drawing them takes some seconds, which a run of
minutes does not feel and a test of ten batches would.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_DIR",
        help="run folder, folder of GLUE results, or the URI of one; several are compared",
    )
    parser.add_argument(
        "--out",
        help="HTML file (default: report.html in the run folder; here for several)",
    )
    parser.add_argument("--title", help="heading (default: the run's name)")
    parser.add_argument("--no-png", action="store_true", help="the HTML file alone: faster")


def main(args: argparse.Namespace) -> int:
    """Write the page and the pictures; say where."""
    if args.out and "://" in args.out:
        raise ConfigError(
            f"--out {args.out} is not on this machine. Write to a local file and copy it."
        )
    alone = len(args.runs) == 1 and "://" not in args.runs[0]
    out = Path(args.out) if args.out else (Path(args.runs[0]) / NAME if alone else Path(NAME))
    written = write_report(args.runs, out, title=args.title, png=not args.no_png)
    print(f"Written: {written[0]}")
    if len(written) > 1:
        print(f"Written: {written[1].parent}/ ({len(written) - 1} PNG)")
    return 0


def write_report(
    folders: Sequence[str], out: Path, *, title: str | None = None, png: bool = False
) -> list[Path]:
    """Write one page about the runs of `folders`, and with `png` its charts beside it.

    Gives the files: the page first. The pictures lie in a folder named after the page.

    Raises:
        DataError: a folder holds no run or cannot be read, or `out` cannot be written.
    """
    runs = [read_run(str(folder)) for folder in folders]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, build_page(runs, title))
        if not png:
            return [out]
        from mosaicbert.report.png import write_pngs

        return [out, *write_pngs(charts_of(runs), runs, out.with_name(f"{out.stem}-png"))]
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror}). Name another file with --out."
        ) from None


def report_at_end(folder: str | Path | None) -> None:
    """Leave `report.html` in a run's folder, and after a long run PNGs in `report-png/` beside it.

    A failure is told and never stops the run.
    """
    if folder is None or not Path(folder).is_dir():
        return
    try:
        rows = read_run(str(folder)).rows
        is_long = bool(rows) and rows[-1]["seconds"] >= PNG_AFTER_SECONDS
        write_report([str(folder)], Path(folder) / NAME, png=is_long)
    except Exception as error:  # the training is done and saved: nothing here may undo that
        log.warning("No report of %s: %s: %s", folder, type(error).__name__, error)
