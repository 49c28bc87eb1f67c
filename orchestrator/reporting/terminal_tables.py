"""Tables of text for a terminal of any width."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

INDENT = "    "
BETWEEN = 2  # spaces between two columns


class Rows:
    """A table if the terminal is wide enough for all of its lines. Otherwise each row becomes an entry: the first cell,
    the others with their columns' names, then the `prose` columns in lines of their own. So no cell is wrapped into a
    narrow column."""

    def __init__(self, *columns: str, prose: Collection[str] = (), numbers: Collection[str] = ()) -> None:
        self.columns, self._prose, self._numbers = columns, prose, numbers
        self._rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        """Cells in the order of the columns."""
        assert len(cells) == len(self.columns), (cells, self.columns)
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        widths = [max(map(len, column)) for column in zip(self.columns, *self._rows, strict=True)]
        if sum(widths) + BETWEEN * (len(widths) - 1) <= options.max_width:
            yield self._table()
        else:
            for row in self._rows:
                yield self._entry(row, options.max_width)

    def _table(self) -> Table:
        table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, BETWEEN, 0, 0))
        for column in self.columns:
            table.add_column(column, no_wrap=True, justify="right" if column in self._numbers else "left")
        for row in self._rows:
            table.add_row(*map(Text, row))
        return table

    def _entry(self, row: tuple[str, ...], width: int) -> Text:
        """`name  column value; column value`, followed by the prose columns."""
        named = list(zip(self.columns, row, strict=True))[1:]
        facts = "; ".join(f"{column} {cell}" for column, cell in named if cell and column not in self._prose)
        return entry(row[0], facts, *(cell for column, cell in named if cell and column in self._prose), width=width)


def entry(name: str, facts: str, *paragraphs: str, width: int) -> Text:
    """A name with facts after it, and paragraphs below; long lines are wrapped with an indent."""
    head = Text(_filled(f"{name}  {facts}".rstrip(), width), "dim")
    head.stylize("not dim bold", 0, len(name))
    for text in paragraphs:
        head.append("\n").append(_filled(text, width, INDENT), "not dim")
    return head


def _filled(text: str, width: int, first: str = "") -> str:
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=INDENT, break_on_hyphens=False)
