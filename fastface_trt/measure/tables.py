"""Text and tables on a terminal, in a pipe, and as Markdown."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

WIDEST = 10_000
"""Columns where there is no terminal, so that nothing is left out of a table in a file or pipe."""


def text_console(*, stderr: bool = False) -> Console:
    """Where commands print: what people wrote is never read as markup, and never shortened."""
    out = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not out.is_terminal:
        out.width = WIDEST
    return out


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; the first `words` columns are words, the others numbers."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


def print_table(out: Console, table: Table) -> None:
    """One table on a terminal."""
    drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column, heading in enumerate(table.headings):
        drawn.add_column(
            heading,
            justify="left" if column < table.words else "right",
            no_wrap=column >= table.words,
        )
    for row in table.rows:
        drawn.add_row(*row)
    out.print(drawn)


def markdown_rows(table: Table) -> Iterator[str]:
    """The lines of a table in Markdown, without its title."""
    numbers = len(table.headings) - table.words
    yield f"| {' | '.join(table.headings)} |"
    yield f"|{'---|' * table.words}{'---:|' * numbers}"
    for row in table.rows:
        yield f"| {' | '.join(row)} |"
