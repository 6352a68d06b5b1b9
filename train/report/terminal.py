"""The results table in the terminal."""

from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from train.report.tables import columns


def summary_table(results: dict[str, Any]) -> Table:
    """One row a mixer, for the terminal; fits 80 columns, where long names are folded."""
    shown = [column for column in columns(results) if column.short]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(shown):
        justify: Literal["left", "right"] = "right" if number else "left"
        head = Text(column.short)
        table.add_column(head, justify=justify, overflow="fold", no_wrap=number > 0)
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*(Text(cell.text.replace(" ± ", "\n±")) for cell in cells))
    return table
