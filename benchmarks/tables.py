"""Tables of results, as text and as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    cells: Sequence[str]
    remark: str = ""
    """Text in place of the cells that follow, such as the reason why they are missing."""
    is_first: bool = False
    """A new group of rows starts here."""
    is_wrong: bool = False


def as_text(heads: Sequence[str], rows: Iterable[Row], names: Sequence[int] = (0,)) -> str:
    """A table whose columns are as wide as their longest cell.

    Args:
        names: columns that hold words and are aligned to the left; the others hold numbers.
    """
    lines = [Row(heads), *rows]  # the headings are a row too
    widths = [max((len(line.cells[i]) for line in lines if i < len(line.cells)), default=0) for i in range(len(heads))]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if i in names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line.cells, widths, strict=False))
        ]
        text.append("  ".join([*cells, line.remark]).rstrip())
    return "\n".join(text)


def as_html(heads: Sequence[str], rows: Iterable[Row], names: Sequence[int] = (0,)) -> str:
    """The same table in HTML, in a box that scrolls where the page is narrower."""
    kinds = [' class="name"' if i in names else "" for i in range(max(len(heads), 1 + max(names)))]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, heads, strict=False))
    body = ""
    for row in rows:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row.cells, strict=False))
        if row.remark:
            span = max(1, len(heads) - len(row.cells))
            cells += f'<td class="missing" colspan="{span}">{escape(row.remark)}</td>'
        classes = " ".join(["first"] * row.is_first + ["wrong"] * row.is_wrong)
        body += f'<tr class="{classes}">{cells}</tr>\n'
    head = f"<thead><tr>{head}</tr></thead>\n" if heads else ""
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>\n'


def as_markdown(heads: Sequence[str], rows: Iterable[Row], names: Sequence[int] = (0,)) -> str:
    """The same table in Markdown, without the marks of its rows."""
    rules = ["---" if i in names else "--:" for i in range(len(heads))]
    lines = [heads, rules, *([*row.cells, *[row.remark] * bool(row.remark)] for row in rows)]
    padded = ([*line, *[""] * (len(heads) - len(line))] for line in lines)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in padded)


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with three significant digits or all before the point."""
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 10 else f"{ms:.3f}"


def percent(share: float) -> str:
    """A share with two significant digits, or all before the point."""
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"


def spread(time: Mapping[str, Any]) -> str:
    """Quartiles of a time in milliseconds."""
    return f"{milliseconds(time['low'])} to {milliseconds(time['high'])}" if time["calls"] > 1 else "one call"
