"""Tables for people: no name and no figure in them is cut off."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 160
"""Of a file or a pipe, such as the one that a bug report is copied from."""


def console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for every table."""
    found = Console()
    if not found.is_terminal:
        found.width = max(found.width, FILE_WIDTH)
    return found


def folded(table: Table) -> Table:
    """The table, with names that are longer than their column going on in the next line."""
    for column in table.columns:
        column.overflow = "fold"
    return table
