"""What `ebb compare` leaves behind: numbers, a report to read in two formats, and figures."""

from pathlib import Path
from typing import Any

from train.checkpoint import save_json, write_atomically, write_text
from train.report.findings import summary_lines as summary_lines
from train.report.html import page
from train.report.markdown import escape_markdown as escape_markdown
from train.report.markdown import report_text as report_text
from train.report.terminal import summary_table as summary_table

RESULTS = "results.json"
REPORT = "report.md"
PAGE = "report.html"


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Writes `results.json`, the plots, `report.html` and, last, `report.md`; the same each time.

    Args:
        results: what `ebb compare` measured, format 1.
        folder: made if it does not exist; older files of these names are replaced.

    Raises:
        ValueError: if the folder cannot be written.
    """
    from train.plots import save_plots  # matplotlib is slow to import

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be made ({error.strerror}): choose another --out."
        ) from error
    save_json(folder / RESULTS, results)
    plots = save_plots(results, folder)
    _write(folder / PAGE, page(results))
    _write(folder / REPORT, report_text(results, plots))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda beside: write_text(beside, text))
